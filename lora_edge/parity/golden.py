"""Golden cases: what PyTorch gave, small enough to ship, replayable without PyTorch.

One ``.npz`` file per probe under the bundle's ``parity/`` folder. It keeps every position, and of
the vocabulary the best tokens and a seeded subset.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_edge.errors import BundleError
from lora_edge.parity.compare import Expected, Floor
from lora_edge.parity.states import Probe, Row

FOLDER = "parity"
_TOP = 8
_SUBSET = 24


@dataclass(frozen=True)
class Golden:
    """A probe and what the reference gave for it.

    Attributes:
        probe: the batch that was run.
        tails: the reference's greedy continuation of each row, fed token by token.
        expected: for each row, the logits at every position of prompt and continuation.
        floor: the reference's own noise on this probe.
        versions: packages and versions of the reference.
    """

    probe: Probe
    tails: tuple[Row, ...]
    expected: tuple[Expected, ...]
    floor: Floor
    versions: dict[str, str]


def golden_path(probe: Probe) -> str:
    """Path of a probe's file relative to the bundle."""
    stem = f"adapter-{probe.adapters[0]}" if probe.kind == "adapter" else probe.kind
    return f"{FOLDER}/{stem}.npz"


def keep(expected: Sequence[Expected], seed: int = 0) -> tuple[Expected, ...]:
    """Reduce whole logits to the best tokens and a seeded subset, the same for every position."""
    kept = []
    random = np.random.default_rng(seed)
    for row in expected:
        vocab = row.reference.shape[1]
        best = np.argsort(-row.reference, axis=-1, kind="stable")[:, :_TOP]
        columns = np.empty((len(best), min(vocab, _TOP + _SUBSET)), np.int64)
        for position, top in enumerate(best):
            rest = np.setdiff1d(np.arange(vocab), top)
            some = random.choice(rest, columns.shape[1] - len(top), replace=False)
            columns[position] = np.sort(np.concatenate([top, some]))
        kept.append(
            Expected(
                columns,
                np.take_along_axis(row.reference, columns, -1),
                None if row.base is None else np.take_along_axis(row.base, columns, -1),
                row.log_total,
                row.top1,
                row.margin,
            )
        )
    return tuple(kept)


def save_golden(directory: Path, golden: Golden) -> str:
    """Write a golden case below a bundle's folder and return its relative path."""
    arrays: dict[str, Any] = {}
    for index, row in enumerate(golden.expected):
        fields = {name: value for name, value in vars(row).items() if value is not None}
        if "columns" in fields:
            fields["columns"] = fields["columns"].astype(np.int32)
        arrays |= {f"{index}.{name}": value for name, value in fields.items()}
    facts = {
        "probe": golden.probe.to_json(),
        "tails": [list(tail) for tail in golden.tails],
        "floor": vars(golden.floor),
        "versions": golden.versions,
    }
    relative = golden_path(golden.probe)
    path = directory / relative
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, facts=np.array(json.dumps(facts)), **arrays)
    path.write_bytes(buffer.getvalue())
    return relative


def load_golden(path: Path) -> Golden:
    """Read a golden case.

    Raises:
        BundleError: the file is not one.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(str(arrays["facts"]))
            probe = Probe.from_json(facts["probe"])
            expected = tuple(_row(arrays, index) for index in range(len(probe.rows)))
            return Golden(
                probe,
                tuple(tuple(tail) for tail in facts["tails"]),
                expected,
                Floor(**facts["floor"]),
                facts["versions"],
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{path} is not a golden case: {error}", "Validate again with --reference."
        ) from error


def _row(arrays: Any, index: int) -> Expected:
    def get(name: str) -> Any:
        key = f"{index}.{name}"
        return arrays[key] if key in arrays.files else None

    columns = get("columns")
    return Expected(
        None if columns is None else columns.astype(np.int64),
        get("reference"),
        get("base"),
        get("log_total"),
        get("top1"),
        get("margin"),
    )
