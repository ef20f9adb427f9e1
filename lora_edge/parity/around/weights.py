"""Every weight of a bundle's graphs against the checkpoint: no probe need reach it.

Names first: a graph of our own capture calls its weights by parameter path. What has another name
is looked up by its content, whole or turned. Weights of few bits are rounded again, merged ones
merged again. One tensor is in memory at a time, beside the checkpoint's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.base.layers import Layers, built_layers
from lora_edge.bundle.bundle import (
    BASE_GRAPH_FILE,
    DECODER_FILE,
    ENCODER_FILE,
    EXACT_GRAPH_FILE,
    GRAPH_FILE,
    ROWS_GRAPH_FILE,
    SINGLE_GRAPH_FILE,
    STATIC_GRAPH_FILE,
    Bundle,
    exact_file,
)
from lora_edge.fit.changes import ParameterChange
from lora_edge.graph import load, same_but_for_activations, same_but_for_half
from lora_edge.graph.contents import Content, contents
from lora_edge.names import packed_paths
from lora_edge.parity.around.reference import Parameters
from lora_edge.parity.merging import merged_changes
from lora_edge.tasks.task import Task

GRAPHS = (
    GRAPH_FILE,
    BASE_GRAPH_FILE,
    SINGLE_GRAPH_FILE,
    ROWS_GRAPH_FILE,
    EXACT_GRAPH_FILE,
    STATIC_GRAPH_FILE,
    ENCODER_FILE,
    exact_file(ENCODER_FILE),
    DECODER_FILE,
    exact_file(DECODER_FILE),
)

_NAMED = 3  # tensors that a reason names
_FEW = 4  # a constant of fewer numbers is used everywhere, so that every probe reaches it
_LIKE = 0.9  # cosine from which a constant is meant to be another
_CHUNK = 1 << 22  # numbers compared at a time
_COMPUTED = 1e-5  # of the largest value: what is computed again, not copied
_COPY = ".merged"
_PARTS = ("codes", "scales", "zeros")

Array = NDArray[Any]


def compare_weights(
    bundle: Bundle, base: Base, sources: Mapping[str, Path], parameters: Parameters
) -> Iterator[str]:
    """Compare all graphs of a bundle with its base's checkpoint.

    Args:
        bundle: the bundle.
        base: its base.
        sources: adapter -> PEFT directory, needed of a merged bundle.
        parameters: the checkpoint, as transformers loads it.

    Yields:
        For each graph file, in which something differs, a sentence; and one where the graph that
        ships is not the one that is proved.
    """
    expected = _Expected(bundle, base, sources, parameters)
    seen: dict[object, str] = {}
    for relative in GRAPHS:
        path = bundle.directory / relative
        if not path.is_file():
            continue
        found: list[str] = []
        held = list(contents(path))
        copied = {x.name.removesuffix(_COPY) for x in held if x.name.endswith(_COPY)}
        for content in held:
            key = (content.name, content.place, content.shape)
            if content.place and key in seen:
                said = seen[key]
            else:
                said = expected.judge(content, copied)
                seen[key] = said
            if said:
                found.append(said)
        if found:
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            yield f"{relative}: {', '.join(found[:_NAMED])}{more}"
    for part in bundle.manifest.parts.values():
        pair = [bundle.directory / x for x in (part.exact or part.file, part.file)]
        made = bundle.manifest.quantization
        same = same_but_for_half if made is not None and made.half else same_but_for_activations
        if part.exact and not same(*map(load, pair)):
            yield (
                f"{part.file} and {part.exact} are not one graph: they differ in more than what "
                "they compute in"
            )


@dataclass
class _Expected:
    """What the tensors of a bundle's graphs should be."""

    bundle: Bundle
    base: Base
    sources: Mapping[str, Path]
    parameters: Parameters
    _coded: tuple[str, Mapping[str, Mapping[str, Array] | None]] = ("", {})

    @cached_property
    def _computed(self) -> list[tuple[str, Array]]:
        part = self.bundle.manifest.gives
        positions = 1 if part.cache is None else part.max_length
        return list(self.parameters.computed(positions))

    @cached_property
    def _layers(self) -> Mapping[str, Layer]:
        manifest = self.bundle.manifest
        return {**manifest.uncovered, **manifest.sites} or self._built.modules

    @cached_property
    def _built(self) -> Layers:
        return built_layers(self.base, Task(self.bundle.manifest.task))

    @cached_property
    def _changes(self) -> Mapping[str, ParameterChange]:
        """What a merged adapter makes of parameters."""
        if self.bundle.manifest.mode != "merged":
            return {}
        ((name, directory),) = self.sources.items()
        return merged_changes(self._built, Task(self.bundle.manifest.task), name, directory)

    @cached_property
    def _digests(self) -> Mapping[bytes, str]:
        """Every parameter by the hash of its content, as it is and turned."""
        found = {}
        for name in self.parameters.names:
            value = self._value(name, name)
            if value is not None and value.size >= _FEW:
                for form in _turned(value):
                    found[_digest(form)] = name
        return found

    def judge(self, content: Content, copied: Set[str]) -> str:
        """What is wrong with a tensor; empty: nothing, or it is none that can be compared.

        Args:
            content: the tensor.
            copied: parameters of which the graph has a merged copy, beside the base's own for
                whoever shares it.
        """
        if int(np.prod(content.shape)) < _FEW:
            return ""
        name, part = content.name, ""
        for suffix in _PARTS:
            if name.endswith(f".weight.{suffix}"):
                name, part = name.removesuffix(f".{suffix}"), suffix
        values = content.values()
        name = name if name in self.parameters else name.removesuffix(_COPY)
        if part:
            return self._judge_codes(name.removesuffix(".weight"), part, values)
        tied = {f"{path}.weight" for path in self.bundle.manifest.tied}
        # Where the adapter changes all that share a weight, nobody reads the base's: one of them
        # has it in place, the others have copies.
        whole = content.name in tied and tied <= set(self._changes)
        shared = content.name in copied and not whole
        changes = [""] if shared else sorted(tied) if whole else [name]
        forms = [
            form
            for change in changes
            if (expected := self._value(name, change)) is not None
            for form in _turned(expected)
        ]
        if forms and sorted(forms[0].shape) == sorted(values.shape):
            computed = name in self._changes and not shared
            return _difference(name, values, forms, computed=computed)
        if values.dtype.kind != "f":
            return ""
        return self._judge_unnamed(content.name, values)

    def _judge_codes(self, name: str, part: str, values: Array) -> str:
        """Codes, scales or zero points of layers of few bits, computed again."""
        layers: dict[str, Array] = {}
        if self._coded[0] != name:  # codes, scales and zero points come one after the other
            self._coded = name, {path: self._packed(path) for path in packed_paths(name)}
        for path, packed in self._coded[1].items():
            if packed is None:
                return (
                    f"{path} is quantized, and the manifest or the checkpoint does not have it so"
                )
            if part not in packed:
                return f"{path} has {part}, and the manifest says that its codes have none"
            # An embedding has the same numbers in another shape, and blocks belong to outputs.
            rows = len(packed[part] if packed["codes"].dtype == np.int8 else packed["codes"])
            layers[path] = packed[part].reshape(rows, -1)
        rows = sum(map(len, layers.values()))
        if values.size % rows:
            return f"{name} ({part}) has the shape {values.shape}"
        found, start, said = values.reshape(rows, -1), 0, []
        for path, expected in layers.items():
            own = found[start : start + len(expected)]
            said.append(_difference(f"{path}.weight ({part})", own, [expected], computed=False))
            start += len(expected)
        return ", ".join(filter(None, said))

    def _packed(self, path: str) -> Mapping[str, Array] | None:
        """The arrays of a layer's codes; ``None``: it should have none."""
        quantization, tied = self.bundle.manifest.quantization, self.bundle.manifest.tied
        weight = self.parameters.value(f"{path}.weight")
        if weight is None and path in tied:
            shared = (self.parameters.value(f"{x}.weight") for x in tied)
            weight = next((x for x in shared if x is not None), None)
        if quantization is None or weight is None:
            return None
        matrix = weight.T if self._layers[path].transposed else weight
        if quantization.merged_first and f"{path}.weight" in self._changes:
            changed = self._changes[f"{path}.weight"](matrix.astype(np.float64))
            matrix = changed.astype(np.float32)
        blocks = quantization.blocks(path, matrix)
        return blocks.channels() if path in quantization.by_channel else blocks.packed()

    def _judge_unnamed(self, name: str, values: Array) -> str:
        """A tensor that no parameter has the name of: found by its content."""
        flat = values.reshape(-1)
        if (flat == flat[0]).all():
            return ""
        alike: tuple[str, float, Array] = ("", 0.0, values)
        for what, computed in self._computed:
            if computed.shape != values.shape:
                continue
            if not _difference(what, values, [computed], computed=True):
                return ""
            likeness = max(_cosine(values, computed), _LIKE * _shared(values, computed))
            if likeness > alike[1]:
                alike = (what, likeness, computed)
        if _digest(values) in self._digests:
            return ""
        for parameter in self.parameters.names:
            expected = self._value(parameter, parameter)
            if expected is None or sorted(expected.shape) != sorted(values.shape):
                continue
            if (expected == expected.reshape(-1)[0]).all():
                continue  # of ones, say: too many constants are like it
            for form in _turned(expected):
                if form.shape == values.shape and (cosine := _cosine(values, form)) > alike[1]:
                    alike = (parameter, cosine, form)
        if alike[1] < _LIKE:
            return ""  # a constant of the graph's own, such as a mask
        return _difference(f"{name}, which is {alike[0]},", values, [alike[2]], computed=True)

    def _value(self, name: str, change: str) -> Array | None:
        """A parameter as the graph should have it: rounded and, as that one is changed, merged."""
        value = self.parameters.value(name)
        manifest = self.bundle.manifest
        path = name.removesuffix(".weight")
        if value is None and name in self._changes:  # a bias that the base does not have
            return self._changes[name](None).astype(np.float32)
        if value is None or value.dtype.kind != "f":
            return value
        transposed = path in self._layers and self._layers[path].transposed
        turned: Callable[[Array], Array] = (lambda x: x.T) if transposed else (lambda x: x)
        made = manifest.quantization
        rounds = made is not None and path in made.layers
        if made is not None and rounds and not made.merged_first:
            value = turned(made.rounded(path, turned(value)))
        if change in self._changes:
            wide = value.astype(np.float64)
            linear = value.ndim == 2 and transposed
            changed = self._changes[change](wide.T if linear else wide)
            value = (changed.T if linear else changed).astype(np.float32)
        if made is not None and rounds and made.merged_first:
            value = turned(made.rounded(path, turned(value)))
        return made.in_half(name, value) if made is not None and made.half else value


def _turned(value: Array) -> list[Array]:
    forms = [value]
    if value.ndim == 2:
        forms.append(value.T)
    if value.ndim == 3:
        forms.append(value.transpose(0, 2, 1))
    return forms


def _digest(value: Array) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    step = max(1, _CHUNK // max(1, value[:1].size))
    for start in range(0, len(value), step):  # a turned matrix is never copied as a whole
        rows = np.ascontiguousarray(value[start : start + step], np.float32)
        digest.update(rows.view(np.uint8).reshape(-1).data)
    return digest.digest()


def _cosine(one: Array, other: Array) -> float:
    a, b = (x.astype(np.float32).reshape(-1) for x in (one, other))
    size = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return abs(float(a @ b)) / size if size else 0.0


def _shared(one: Array, other: Array) -> bool:
    """Whether a tenth of two tables' numbers are the same, zeros and ones apart."""
    telling = (other != 0) & (np.abs(other) != 1)
    same = np.isclose(one, other, rtol=0, atol=_COMPUTED) & telling
    return bool(telling.any() and same.sum() >= telling.sum() / 10)


def _difference(what: str, values: Array, forms: list[Array], *, computed: bool) -> str:
    """How a tensor differs from what it should be, in any of these forms; empty: not at all."""
    said = ""
    fewest = None
    for expected in forms:
        if expected.shape != values.shape:
            continue
        wanted = expected.astype(values.dtype, copy=False)
        count, row, worst = _odd_rows(values, wanted, computed=computed)
        if not count:
            return ""
        if fewest is None or count < fewest:
            fewest = count
            rows = len(values)
            said = (
                f"{what} differs from the checkpoint's in {count} of {rows} rows, first in row "
                f"{row} (by {worst:.2g} at most)"
            )
    return said or f"{what} has the shape {values.shape}"


def _odd_rows(values: Array, wanted: Array, *, computed: bool) -> tuple[int, int, float]:
    """Number of rows that differ, the first of them, and the largest difference."""
    size = max(1, values[0].size)
    step = max(1, _CHUNK // size)
    allowed = 0.0
    if computed and values.dtype.kind == "f":
        allowed = _COMPUTED * float(np.abs(wanted).max())
    count, first, worst = 0, -1, 0.0
    for start in range(0, len(values), step):
        own, theirs = values[start : start + step], wanted[start : start + step]
        if np.array_equal(own, theirs):
            continue
        apart = np.abs(own.astype(np.float64) - theirs.astype(np.float64)).reshape(len(own), -1)
        largest = np.where(np.isnan(apart), np.inf, apart).max(1)
        odd = np.flatnonzero(largest > allowed)
        if len(odd):
            count += len(odd)
            first = start + int(odd[0]) if first < 0 else first
            worst = max(worst, float(largest.max()))
    return count, first, worst
