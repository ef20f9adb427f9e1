"""Golden cases: what PyTorch gave, small enough to ship, replayable without PyTorch.

One ``.npz`` file per probe under the bundle's ``parity/`` folder. It keeps every position (fewer
where dozens of adapters share the room), and of the vocabulary the best tokens and a seeded subset.
File names carry a hash of the content, so that a bundle's manifest can go from old to new files in
one step.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from lora_edge.bundle import Bundle
from lora_edge.errors import BundleError
from lora_edge.files.arrays import read_arrays
from lora_edge.files.json import parse_object
from lora_edge.files.schema import decode
from lora_edge.parity.compare import Expected, Floor
from lora_edge.parity.states import Probe, Row

FOLDER = "parity"
_TOP = 6
_SUBSET = 18
_LEAST = 4  # columns that are kept in any case; without room for them, the continuation is cut
_BUDGET = 900_000  # bytes of all golden cases together
# Bytes: a column is its id, its logit and the base's; a position its total, best token, margin.
_COLUMN, _POSITION = 12, 20


@dataclass(frozen=True)
class Golden:
    """A probe and what the reference gave for it.

    Attributes:
        probe: the batch that was run.
        tails: the continuation of each row, fed token by token; ``expected`` judges it.
        expected: for each row, the logits at every position of prompt and continuation.
        floors: label of a state -> the reference's own noise in it.
        versions: packages and versions of the reference.
    """

    probe: Probe
    tails: tuple[Row, ...]
    expected: tuple[Expected, ...]
    floors: Mapping[str, Floor]
    versions: Mapping[str, str]

    @property
    def prompts(self) -> list[int]:
        """How many positions of each row come before its continuation."""
        pairs = zip(self.expected, self.tails, strict=True)
        return [len(row.top1) - len(tail) for row, tail in pairs]

    @property
    def stem(self) -> str:
        """What the file is called, without its hash."""
        probe = self.probe
        stem = f"adapter-{probe.adapters[0]}" if probe.kind == "adapter" else str(probe.kind)
        if probe.batch > 1:
            stem += f"-{probe.batch}"
        return f"given-{stem}" if probe.given else stem


def stem_of(relative: str) -> str | None:
    """The stem of a golden file's path in a bundle; ``None`` if it is not one."""
    path = Path(relative)
    if path.parent.name != FOLDER or path.suffix != ".npz":
        return None
    return path.stem.rpartition("-")[0]


def reduce(golden: Golden, probes: int, *, seed: int = 0) -> Golden:
    """Keep the best tokens and a seeded subset of the vocabulary at every position.

    Args:
        golden: a case with whole logits.
        probes: how many cases share the budget of 1 MB; the more, the smaller the subset, and in
            the end the shorter the continuation.
        seed: of the subset, which is the same at all positions of a row.
    """
    share = _BUDGET / probes
    allowed = int(share / (_POSITION + _COLUMN * _LEAST)) - sum(golden.prompts)
    golden = shortened(golden, max(1, allowed // len(golden.prompts)))
    positions = sum(len(row.top1) for row in golden.expected)
    affordable = int((share / positions - _POSITION) / _COLUMN)
    wanted = max(_LEAST, min(_TOP + _SUBSET, affordable))
    return replace(golden, expected=tuple(_reduced(row, wanted, seed) for row in golden.expected))


def shortened(golden: Golden, steps: int) -> Golden:
    """The case with a continuation of so many tokens at most."""
    if steps >= golden.probe.steps:
        return golden
    return replace(
        golden,
        probe=replace(golden.probe, steps=steps),
        tails=tuple(tail[:steps] for tail in golden.tails),
        expected=tuple(
            row.first(length + steps)
            for row, length in zip(golden.expected, golden.prompts, strict=True)
        ),
    )


def _reduced(row: Expected, wanted: int, seed: int) -> Expected:
    vocab = row.reference.shape[1]  # of a task head's labels, each adapter has its own number
    count = min(vocab, wanted)
    subset = np.sort(np.random.default_rng(seed).permutation(vocab)[: count - count // 4])
    rest = row.reference.copy()
    rest[:, subset] = -np.inf  # each token is kept once
    few = count - len(subset)
    best = np.argpartition(-rest, few - 1, axis=-1)[:, :few] if few else rest[:, :0]
    columns = np.concatenate([np.broadcast_to(subset, (len(rest), len(subset))), best], axis=1)
    columns = columns.astype(np.int64)
    return replace(
        row,
        columns=columns,
        reference=np.take_along_axis(row.reference, columns, -1),
        base=None if row.base is None else np.take_along_axis(row.base, columns, -1),
    )


def save_golden(directory: Path, golden: Golden) -> str:
    """Write a golden case below a bundle's folder and return its relative path."""
    arrays: dict[str, Any] = {}
    for index, row in enumerate(golden.expected):
        fields = {name: value for name, value in vars(row).items() if value is not None}
        for name in fields.keys() & {"columns", "top1"}:
            fields[name] = fields[name].astype(np.int32)
        arrays |= {f"{index}.{name}": value for name, value in fields.items()}
    facts = {
        "probe": golden.probe.to_json(),
        "tails": [list(tail) for tail in golden.tails],
        "floors": {name: vars(floor) for name, floor in golden.floors.items()},
        "versions": dict(golden.versions),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, facts=np.array(json.dumps(facts)), **arrays)
    content = buffer.getvalue()
    relative = f"{FOLDER}/{golden.stem}-{hashlib.sha256(content).hexdigest()[:8]}.npz"
    path = directory / relative
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return relative


def recorded(bundle: Bundle) -> list[Golden]:
    """The golden cases of a bundle, the base first; raises as :func:`load_golden`."""
    files = sorted(name for name in bundle.manifest.files if stem_of(name) is not None)
    order = ("base", "adapter", "blend", "mixed")
    goldens = [load_golden(bundle.path(name)) for name in files]
    return sorted(goldens, key=lambda golden: order.index(golden.probe.kind))


def load_golden(path: Path) -> Golden:
    """Read a golden case.

    Raises:
        BundleError: the file is not one.
    """
    hint = "Export the bundle again."
    arrays = read_arrays(path, BundleError, hint)
    written = parse_object(str(arrays.get("facts", "")), f"{path}: facts", BundleError, hint)
    facts = decode(_Facts, written, f"{path}: facts", BundleError, hint)
    probe, tails = facts["probe"], facts["tails"]
    try:
        if not len(probe.rows) == len(probe.states) == len(tails):
            raise ValueError(f"{len(probe.rows)} rows, but {len(tails)} continuations")
        expected = tuple(_row(arrays, index) for index in range(len(probe.rows)))
        for row in expected:
            _check(row)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is not a golden case: {error}", hint) from error
    return Golden(probe, tails, expected, facts["floors"], facts["versions"])


class _Facts(TypedDict):
    probe: Probe
    tails: tuple[Row, ...]
    floors: Mapping[str, Floor]
    versions: Mapping[str, str]


def _check(row: Expected) -> None:
    """The arrays of a row belong together, and are numbers.

    Raises:
        ValueError: they do not, or are not.
    """
    arrays = {name: value for name, value in vars(row).items() if value is not None}
    length, *columns = row.reference.shape
    for name, array in arrays.items():
        wide = name in ("columns", "reference", "base")
        if array.shape != (length, *(columns if wide else ())) or array.dtype.kind not in "fi":
            raise ValueError(f"{name} is {array.shape} {array.dtype}, beside {length} positions")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or Inf")


def _row(arrays: Mapping[str, Any], index: int) -> Expected:
    base = f"{index}.base"
    return Expected(
        arrays[f"{index}.columns"].astype(np.int64),
        arrays[f"{index}.reference"],
        arrays.get(base),
        arrays[f"{index}.log_total"],
        arrays[f"{index}.top1"].astype(np.int64),
        arrays[f"{index}.margin"],
    )


def golden_stems(bundle: Bundle) -> Sequence[str]:
    """The stems of a bundle's golden files."""
    return [stem for name in bundle.manifest.files if (stem := stem_of(name)) is not None]
