"""Golden cases: what PyTorch gave, small enough to ship, replayable without PyTorch.

One ``.npz`` file per probe under the bundle's ``parity/`` folder. It keeps every position (fewer
where dozens of adapters share the room; of long prompts the last and a logarithmic sample of those
before), and of the vocabulary the best tokens and a seeded subset.
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
from numpy.typing import NDArray

from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import BundleError
from lora_edge.files.arrays import read_arrays
from lora_edge.files.json import parse_object
from lora_edge.files.schema import decode
from lora_edge.files.spilled import by_rows
from lora_edge.parity.compare import Expected, Floor
from lora_edge.parity.plan.states import Probe, Row

FOLDER = "parity"
_TOP = 6
_SUBSET = 18
_LEAST = 4  # columns that are kept in any case; without room for them, the continuation is cut
_BUDGET = 640_000  # bytes of the golden cases that every state has, together
_FAR_BUDGET = 240_000  # of those that reach further
_FEWEST = 8  # positions of a row that are kept in any case
_MOST = 64
# Bytes: a column is its logit and the base's, and its id, which takes next to nothing where it is
# the same at all positions; a position its total, best token and margin.
_BEST, _SAME, _POSITION = 12, 9, 17
_OF_A_ROW = 1200  # bytes of the names and headers of its arrays


@dataclass(frozen=True)
class Golden:
    """A probe and what the reference gave for it.

    Attributes:
        probe: the batch that was run.
        tails: the continuation of each row, fed token by token; ``expected`` judges it.
        expected: for each row, the logits at every position of prompt and continuation.
        floors: label of a state -> the reference's own noise in it.
        versions: packages and versions of the reference.
        observed: what the bundle gave for each row while it proposed the tails, in the session that
            did; ``None``: nothing yet. It is not kept.
    """

    probe: Probe
    tails: tuple[Row, ...]
    expected: tuple[Expected, ...]
    floors: Mapping[str, Floor]
    versions: Mapping[str, str]
    observed: Sequence[NDArray[np.float32]] | None = None

    @property
    def prompts(self) -> list[int]:
        """How many positions of each row come before its continuation."""
        pairs = zip(self.expected, self.tails, strict=True)
        return [row.length - len(tail) for row, tail in pairs]

    @property
    def stem(self) -> str:
        """What the file is called, without its hash."""
        probe = self.probe
        stem = f"adapter-{probe.adapters[0]}" if probe.kind == "adapter" else str(probe.kind)
        if probe.batch > 1:
            stem += f"-{probe.batch}"
        if probe.given:
            return f"given-{stem}"
        return f"{probe.part}-{stem}" if probe.part else stem


def stem_of(relative: str) -> str | None:
    """The stem of a golden file's path in a bundle; ``None`` if it is not one."""
    path = Path(relative)
    if path.parent.name != FOLDER or path.suffix != ".npz":
        return None
    return path.stem.rpartition("-")[0]


def is_report(relative: str) -> bool:
    """Whether a path in a bundle is that of the report that it carries."""
    return relative.startswith(f"{FOLDER}/report-")


def reduce(golden: Golden, probes: int, *, seed: int = 0) -> Golden:
    """Keep the best tokens and a seeded subset of the vocabulary at every position.

    Args:
        golden: a case with whole logits.
        probes: how many cases share the budget of 1 MB; the more, the smaller the subset, and in
            the end the shorter the continuation, and the fewer the positions.
        seed: of the subset, which is the same at all positions of a row.
    """
    golden = replace(golden, observed=None)
    if golden.probe.part:
        return _sampled(golden, _FAR_BUDGET / probes, seed)
    share = _BUDGET / probes
    allowed = int(share / (_POSITION + _cost(_LEAST))) - sum(golden.prompts)
    steps = allowed // len(golden.prompts)
    if steps < min(_FEWEST, golden.probe.steps):
        return _sampled(golden, share, seed)
    golden = shortened(golden, steps)
    positions = sum(len(row.top1) for row in golden.expected)
    wanted = _affordable(share / positions - _POSITION)
    return replace(golden, expected=tuple(_reduced(row, wanted, seed) for row in golden.expected))


def _sampled(golden: Golden, share: float, seed: int) -> Golden:
    """The case with some of its positions: what it is fed stays whole."""
    each = share / len(golden.expected) - _OF_A_ROW
    most = max(_FEWEST, min(_MOST, int(each / (_POSITION + _cost(_LEAST)))))
    rows = [
        _at(row, _places(count, row.length, most))
        for row, count in zip(golden.expected, golden.prompts, strict=True)
    ]
    wanted = _affordable(each / max(len(row.top1) for row in rows) - _POSITION)
    return replace(golden, expected=tuple(_reduced(row, wanted, seed) for row in rows))


def _places(prompt: int, length: int, most: int) -> NDArray[np.int64]:
    """The positions of a row that are kept, ``most`` or one more.

    The last of the prompt and of the row, the others of the prompt on a logarithmic scale, those of
    the continuation evenly; half of them are the continuation's, if it has so many.
    """
    if length <= most:
        return np.arange(length)
    tail = min(length - prompt, most // 2)
    early = np.geomspace(1, prompt, most - tail).round().astype(np.int64) - 1
    late = np.linspace(prompt, length - 1, tail).round().astype(np.int64)
    return np.unique(np.concatenate([early, late, [prompt - 1, length - 1]]))


def _at(row: Expected, places: NDArray[np.int64]) -> Expected:
    if len(places) == row.length:
        return row
    return replace(row.at(places), places=places)


def _cost(columns: int) -> int:
    """Bytes of the columns of one position."""
    best = columns // 4
    return _BEST * best + _SAME * (columns - best)


def _affordable(room: float) -> int:
    """How many columns of a position fit."""
    counts = range(_TOP + _SUBSET, _LEAST, -1)
    return next((count for count in counts if _cost(count) <= room), _LEAST)


def shortened(golden: Golden, steps: int) -> Golden:
    """The case with a continuation of so many tokens at most."""
    if steps >= golden.probe.steps:
        return golden
    return replace(
        golden,
        probe=replace(golden.probe, steps=steps),
        tails=tuple(tail[:steps] for tail in golden.tails),
        expected=tuple(
            row.first(length + min(steps, len(tail)))
            for row, length, tail in zip(golden.expected, golden.prompts, golden.tails, strict=True)
        ),
    )


def _reduced(row: Expected, wanted: int, seed: int) -> Expected:
    vocab = row.reference.shape[1]  # of a task head's labels, each adapter has its own number
    count = min(vocab, wanted)
    subset = np.sort(np.random.default_rng(seed).permutation(vocab)[: count - count // 4])
    few = count - len(subset)
    positions = len(row.reference)
    columns = np.empty((positions, count), np.int64)
    columns[:, : len(subset)] = subset
    reference = np.empty(columns.shape, row.reference.dtype)
    base = None if row.base is None else np.empty(columns.shape, row.base.dtype)
    for part in by_rows(row.reference, row.base):
        if few:
            rest = -row.reference[part]
            rest[:, subset] = np.inf  # each token is kept once
            columns[part, len(subset) :] = np.argpartition(rest, few - 1, axis=-1)[:, :few]
        reference[part] = np.take_along_axis(row.reference[part], columns[part], -1)
        if row.base is not None and base is not None:
            base[part] = np.take_along_axis(row.base[part], columns[part], -1)
    return replace(row, columns=columns, reference=reference, base=base)


def save_golden(directory: Path, golden: Golden) -> str:
    """Write a golden case below a bundle's folder and return its relative path."""
    arrays: dict[str, Any] = {}
    for index, row in enumerate(golden.expected):
        fields = {name: value for name, value in vars(row).items() if value is not None}
        for name in fields.keys() & {"columns", "top1", "places"}:
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
    """The golden cases, the base first and far ones last; raises as :func:`load_golden`."""
    files = sorted(name for name in bundle.manifest.files if stem_of(name) is not None)
    goldens = [load_golden(bundle.path(name)) for name in files]
    return sorted(goldens, key=_place)


def _place(golden: Golden) -> tuple[Any, ...]:
    """As the plan has them: crowds last, but for the user's own."""
    probe, kinds, parts = golden.probe, ("base", "adapter", "blend", "mixed"), ("pair", "crowd")
    shared = parts.index(probe.part) + 1 if probe.part in parts else 0
    names = probe.adapters if probe.kind == "adapter" else ()
    return probe.given, shared, kinds.index(probe.kind), names, bool(probe.part), probe.batch


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
        if probe.rests and not (len(probe.rests) == len(tails) and min(probe.rests) >= 0):
            raise ValueError(f"{len(probe.rows)} rows, which rest for {probe.rests} steps")
        expected = tuple(_row(arrays, index) for index in range(len(probe.rows)))
        for row, tail in zip(expected, tails, strict=True):
            _check(row)
            if row.length <= len(tail):
                raise ValueError(f"{row.length} positions, of which {len(tail)} are continuation")
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
    if row.columns is not None and (row.columns < 0).any():
        raise ValueError("columns are negative")
    if row.places is not None and (np.diff(row.places, prepend=-1) < 1).any():
        raise ValueError("places do not ascend")
    if row.places is not None and not (np.diff(row.places, prepend=-1) > 0).all():
        raise ValueError("places are not ascending")


def _row(arrays: Mapping[str, Any], index: int) -> Expected:
    base, places = f"{index}.base", arrays.get(f"{index}.places")
    return Expected(
        arrays[f"{index}.columns"].astype(np.int64),
        arrays[f"{index}.reference"],
        arrays.get(base),
        arrays[f"{index}.log_total"],
        arrays[f"{index}.top1"].astype(np.int64),
        arrays[f"{index}.margin"],
        None if places is None else places.astype(np.int64),
    )


def golden_stems(bundle: Bundle) -> Sequence[str]:
    """The stems of a bundle's golden files."""
    return [stem for name in bundle.manifest.files if (stem := stem_of(name)) is not None]
