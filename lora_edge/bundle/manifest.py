"""``lora_edge.json``: what a runtime or a person needs to know about a bundle, and its JSON.

Knows JSON; knows nothing of the files that it tells of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from lora_edge.bundle.part import Beginning, Part, Positions, SiteEntry, StaticGraph, Token
from lora_edge.errors import BundleError
from lora_edge.files.json import parse_object
from lora_edge.files.schema import FINITE, RelativePath, Rule, Sha256, between, decode
from lora_edge.maths.quantization import Precision, Quantization
from lora_edge.maths.survival import Survival
from lora_edge.names import TextAspect
from lora_edge.tasks.task import TASKS, Driver, Task

MANIFEST_NAME = "lora_edge.json"
FORMAT_VERSION = 2

Mode = Literal["switchable", "merged"]
TaskName = Annotated[str, Rule(f"one of {', '.join(TASKS)}", TASKS.__contains__)]


@dataclass(frozen=True)
class ConversionEntry:
    """What an adapter of another type lost when it became a LoRA.

    Attributes:
        peft_type: the other type.
        rank: what was asked for: a rank, or a share of each delta's energy.
        worst_error: relative error of ΔW, of the layer where it is largest.
        mean_error: the same in the mean over its layers.
    """

    peft_type: str
    rank: Annotated[int | float, FINITE]
    worst_error: Annotated[float, FINITE]
    mean_error: Annotated[float, FINITE]


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter of the bundle.

    Attributes:
        name: how the runtime refers to it.
        file: path of the ``.onnx_adapter`` relative to the bundle; empty when merged.
        kind: human-readable kind, e.g. ``LoRA``, ``rsLoRA``, ``none``.
        ranks: rank per site that the adapter changes (others have rank 0 or zeros).
        digest: sha256 of the PEFT files it came from.
        base_fingerprint: fingerprint of the base model that it was exported for.
        proved: parity with PyTorch was checked, and passed when it last was.
        alone: why it is neither blended nor weighted, e.g. ``DoRA``; empty where it may be.
        invocation: token ids that activate an aLoRA; empty for any other adapter.
        labels: names of the outputs of its task head.
        text: what it brings of its own, because it differs from the base's: ``tokenizer`` (ids,
            special tokens), ``chat_template``. The files are in ``adapters/NAME/text/``; of a
            merged bundle they are the bundle's own.
        conversion: for a LoRA that approximates an adapter of another type.
        half: path of the same tensors in float16, for clients that give them to a graph in float16
            as they are; empty elsewhere.
    """

    name: str
    file: RelativePath | Literal[""]
    kind: str
    ranks: Mapping[str, Positions]
    digest: str
    base_fingerprint: str
    proved: bool
    alone: str = ""
    invocation: tuple[Token, ...] = ()
    labels: tuple[str, ...] = ()
    text: tuple[TextAspect, ...] = ()
    conversion: ConversionEntry | None = None
    half: RelativePath | Literal[""] = ""


@dataclass(frozen=True)
class FileEntry:
    """Content hash and size of a file of the bundle.

    Attributes:
        sha256: of the content.
        bytes: its size.
        sample: :func:`lora_edge.files.sample.sample_file` of a large file; None in bundles from
            before it was recorded.
    """

    sha256: Sha256
    bytes: Annotated[int, between(0, 1 << 50)]
    sample: Sha256 | None = None


@dataclass(frozen=True)
class Manifest:
    """``lora_edge.json``: everything a runtime or a person needs to know about a bundle.

    Attributes:
        mode: ``switchable`` (adapters are inputs) or ``merged`` (one adapter is in the weights).
        task: one of :data:`lora_edge.tasks.task.TASKS`.
        precision: precision of the graph's linear layers: ``fp32``, ``fp16``, ``int8`` or ``int4``.
        parts: name -> graph: ``decoder``, ``encoder``, or both, as the task has it.
        base: ``name_or_path``, ``model_type``, ``fingerprint`` of the base model.
        kinds: which kinds of adapter the graph has inputs for, e.g. ``lora``, ``dora``.
        uncovered: module path -> layer that an adapter could change and that has no inputs.
        tied: module paths of the embedding and of the output layer that shares its weight; empty
            where none does.
        adapters: name -> adapter.
        base_check: figures of the base graph's check against eager PyTorch.
        versions: versions of the packages that made the bundle.
        files: relative path -> hash and size, of every other file of the bundle.
        quantization: how the base's weights were rounded; ``None`` where they were not.
        survival: what is left of a merged adapter whose layers were rounded; ``None``: none were.
        beginning: what the answers of an encoder-decoder begin with; ``None`` for other tasks.
    """

    mode: Mode
    task: TaskName
    precision: Precision
    parts: Mapping[str, Part]
    base: Mapping[str, str]
    kinds: tuple[str, ...]
    adapters: Mapping[str, AdapterEntry]
    base_check: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[RelativePath, FileEntry] = field(default_factory=dict)
    uncovered: Mapping[str, SiteEntry] = field(default_factory=dict)
    tied: tuple[str, ...] = ()
    quantization: Quantization | None = None
    survival: Survival | None = None
    beginning: Beginning | None = None
    format_version: int = FORMAT_VERSION

    @cached_property
    def sites(self) -> Mapping[str, SiteEntry]:
        """Module path -> layer with inputs for adapters, of all parts."""
        return {path: site for part in self.parts.values() for path, site in part.sites.items()}

    @property
    def half(self) -> bool:
        """The base's weights are float16, and its graphs compute in it."""
        return self.precision == "fp16"

    @property
    def driver(self) -> Driver:
        """What runs the parts."""
        return Task(self.task).driver

    @property
    def reads(self) -> Part:
        """The part that reads the inputs."""
        return self.parts[Task(self.task).parts[0]]

    @property
    def gives(self) -> Part:
        """The part that gives the outputs."""
        return self.parts[Task(self.task).parts[-1]]

    @property
    def head(self) -> str:
        """Module path of the layer that makes the logits of a vocabulary; empty: none does."""
        return self.gives.head

    def to_json(self) -> str:
        """The manifest as indented JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str | bytes, what: str = MANIFEST_NAME) -> Manifest:
        """Parse a manifest, of this format version or an earlier one; ``what`` names it in errors.

        Raises:
            BundleError: not a manifest, or one of a format version that this release cannot read.
        """
        data = parse_object(text, what, BundleError, _HINT)
        version = data.get("format_version")
        if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
            raise BundleError(
                f"{what} has format_version {version!r}, expected {FORMAT_VERSION}",
                "Use the lora-edge release that wrote the bundle, or export it again.",
            )
        if version == 1:
            from lora_edge.bundle.lifting import lift  # few bundles need it

            data = lift(data)
        manifest = decode(Manifest, data, what, BundleError, _HINT)
        manifest._check(what)
        return manifest

    def _check(self, what: str) -> None:
        """Check what one field says of another."""
        for name in ("fingerprint", "model_type", "name_or_path"):
            if name not in self.base:
                raise BundleError(f"{what}: base.{name} is missing", _HINT)
        wanted = Task(self.task).parts
        if set(self.parts) != set(wanted) or (self.beginning is not None) != (len(wanted) > 1):
            more = " and a beginning" if len(wanted) > 1 else ""
            raise BundleError(
                f"{what}: a bundle of {self.task} has the parts {' and '.join(wanted)}{more}, got "
                f"{', '.join(self.parts) or 'none'}",
                _HINT,
            )
        for name, part in self.parts.items():
            if (part.cache is None) != (self.driver != "decoder"):
                raise BundleError(f"{what}: parts.{name}.cache is not of {self.task}", _HINT)
            if not part.inputs:
                raise BundleError(f"{what}: parts.{name}.inputs is empty", _HINT)
            if part.static is not None:
                self._check_static(what, name, part, part.static)
        for key, entry in self.adapters.items():
            if entry.name != key:
                raise BundleError(
                    f"{what}: the adapter {key!r} is called {entry.name!r} inside", _HINT
                )
            if self.mode == "switchable" and entry.file not in self.files:
                raise BundleError(
                    f"{what}: adapter {key!r} has the file {entry.file!r}, which is none "
                    "of the bundle's",
                    _HINT,
                )
            if entry.half and entry.half not in self.files:
                raise BundleError(
                    f"{what}: adapter {key!r} has the file {entry.half!r}, which is none "
                    "of the bundle's",
                    _HINT,
                )

    def _check_static(self, what: str, name: str, part: Part, static: StaticGraph) -> None:
        where = f"{what}: parts.{name}.static"
        if part.cache is None or part.form != "portable":
            raise BundleError(f"{where} is of a {part.form} graph, expected a portable one", _HINT)
        if static.file == part.file or static.file not in self.files:
            raise BundleError(
                f"{where}.file is {static.file!r}, which is none of the bundle's own", _HINT
            )
        if bool(static.rank) != bool(part.sites):
            raise BundleError(
                f"{where}.rank is {static.rank}, and the graph has {len(part.sites)} sites", _HINT
            )
        if part.max_length and static.room > part.max_length:
            raise BundleError(
                f"{where} has {static.room} positions, and the model {part.max_length}", _HINT
            )


_HINT = "Copy the bundle again, or export it again."


def survival_line(manifest: Manifest) -> str:
    """What is left of a merged adapter whose layers were rounded; empty: none were."""
    found = manifest.survival
    return "" if found is None else f"Survival, measured at export: {found.line()}."


def aspect_names(aspects: Sequence[TextAspect]) -> str:
    """What an adapter brings, in words, e.g. ``tokenizer and chat template``."""
    return " and ".join(aspect.replace("_", " ") for aspect in aspects)
