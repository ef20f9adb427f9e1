"""A folder that shows a failure with plain ONNX Runtime: inputs, both outputs, and a script.

Knows bundles and runtimes; needs no PyTorch, for what PyTorch gave is in the golden case.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import BundleError
from lora_edge.files.transaction import staging
from lora_edge.maths.lora import FloatArray
from lora_edge.names import is_past
from lora_edge.parity.compare import Floor, Tolerance
from lora_edge.parity.explain.failure import kept, place_of
from lora_edge.parity.explain.rerun import alone, new_columns, rerun, run_of
from lora_edge.parity.plan.states import Probe, Row, label
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.subjects import subject_of
from lora_edge.runtime import Runner

if TYPE_CHECKING:
    from lora_edge.parity.explain.localise import Divergence

_SCRIPT = Path(__file__).with_name("repro_script.py")
_FILES = {
    "README.txt",
    "actual.npy",
    "case.json",
    "columns.npy",
    "expected.npy",
    "inputs.npz",
    "layers.json",
    "repro.py",
}
_README = """\
{case}: the graph differs from PyTorch ({what}).
{found}
Run it with numpy and onnxruntime alone: python repro.py [path of the bundle's {file}]
inputs.npz is all that the graph is fed, adapters included; expected.npy is what PyTorch gave,
actual.npy what the graph gave, at the output's columns.npy; layers.json compares layer by layer.
"""


@dataclass(frozen=True)
class _Shown:
    """One run of the graph that differs from PyTorch, and where in its output.

    Attributes:
        what: what it takes, for people.
        feeds: graph input name -> array.
        index: of the output: the row, and the position where there is one for each token.
        actual: ``[vocab] float32``, what the graph gave there.
        position: of the row's expected outputs.
    """

    what: str
    feeds: Mapping[str, NDArray[Any]]
    index: tuple[int, ...]
    actual: FloatArray
    position: int


def write_repro(
    directory: str | os.PathLike[str],
    runner: Runner,
    golden: Golden,
    divergence: Divergence | None = None,
    row: int | None = None,
    tolerance: Tolerance | None = None,
) -> Path | None:
    """Leave the smallest reproduction of a failure that can be found.

    The row is tried alone before its batch, in one run before token by token; of its tokens, as
    few are kept as make the outputs after the last of them differ.

    Args:
        directory: the folder to write; one that this function made is replaced.
        runner: of the bundle, in the session that failed.
        golden: the case that failed.
        divergence: what :func:`lora_edge.parity.explain.localise.localise` found, if it was asked.
        row: which of its rows; ``None``: the one with the largest error.
        tolerance: gives the multiple.

    Returns:
        The folder; ``None`` where the failure does not show when the case is run again, or the
        bundle is an encoder-decoder.

    Raises:
        BundleError: the folder cannot be written, or holds something else.
    """
    if not subject_of(runner.bundle.manifest).layered:
        return None
    limits = tolerance or Tolerance()
    index = worst_row(runner, golden, limits) if row is None else row
    shown = next(_found(runner, golden, index, limits), None)
    if shown is None:
        return None
    target = Path(directory).absolute()
    there = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if there and (there - _FILES or "case.json" not in there):
        raise BundleError(
            f"{target} holds files that are no reproduction", "Name another folder with --repro."
        )
    with staging(target, force=True, marker="repro.py") as stage:
        _write(stage, target, runner, golden, index, limits, shown, divergence)
    return target


def worst_row(runner: Runner, golden: Golden, tolerance: Tolerance | None = None) -> int:
    """The row of a case whose error is largest beside its limit."""
    actual = rerun(runner, golden.probe, golden.tails)
    return int(
        np.argmax(
            [
                _excess(golden, row, actual[row], tolerance or Tolerance()).max()
                for row in range(len(actual))
            ]
        )
    )


def _found(runner: Runner, golden: Golden, row: int, tolerance: Tolerance) -> Iterator[_Shown]:
    """Runs that differ, the smallest first."""
    probe, tails = alone(golden, row), golden.tails[row]
    whole = dataclasses.replace(probe, rows=((*probe.rows[0], *tails),))
    if not subject_of(runner.bundle.manifest).behind:
        yield from _runs(runner, golden, probe, [()], 0, row, tolerance, "one row")
    else:
        (outputs,) = rerun(runner, whole, [()])
        for position in _bad(golden, row, outputs, tolerance)[:1]:
            yield from _prefix(runner, golden, whole, row, position, tolerance)
            yield from _runs(runner, golden, whole, [()], 0, row, tolerance, "one row")
        yield from _runs(runner, golden, probe, [tails], 0, row, tolerance, "one row, with a past")
    if len(golden.probe.rows) > 1:
        yield from _runs(
            runner, golden, golden.probe, golden.tails, row, row, tolerance, "a batch of rows"
        )


def _prefix(
    runner: Runner, golden: Golden, whole: Probe, row: int, position: int, tolerance: Tolerance
) -> Iterator[_Shown]:
    """The row cut off after the first position that differs: what comes later has no part in it.

    Not for an aLoRA: where it begins is decided by the whole prompt.
    """
    if any(runner.bundle.adapter(name).invocation for name in whole.adapters):
        return
    cut = dataclasses.replace(whole, rows=(whole.rows[0][: position + 1],))
    (outputs,) = rerun(runner, cut, [()])
    if position in _bad(golden, row, outputs, tolerance):
        feeds = _feeds(runner, cut, [()], 0)
        length = len(cut.rows[0])
        what = f"one row of {length} token{'s' if length > 1 else ''}"
        index = _index(runner, feeds, 0, position, length)
        yield _Shown(what, feeds, index, outputs[position], position)


def _runs(
    runner: Runner,
    golden: Golden,
    probe: Probe,
    tails: Sequence[Row],
    index: int,
    row: int,
    tolerance: Tolerance,
    what: str,
) -> Iterator[_Shown]:
    """The first run of the graph that differs on a row, with all that the batch has."""
    outputs = rerun(runner, probe, tails)[index]
    for position in _bad(golden, row, outputs, tolerance)[:1]:
        first = len(outputs) - len(tails[index])  # positions of the first run
        run = 0 if position < first else run_of(probe, tails, index, position - first)
        feeds = _feeds(runner, probe, tails, run)
        begins, count = (0, first) if run == 0 else (position, 1)
        place = _index(runner, feeds, index, position - begins, count)
        yield _Shown(what, feeds, place, outputs[position], position)


def _index(
    runner: Runner, feeds: Mapping[str, NDArray[Any]], row: int, offset: int, count: int
) -> tuple[int, ...]:
    """Where the ``offset``-th of the last ``count`` tokens of a row is in the graph's output."""
    name = runner.bundle.manifest.gives.output
    shape = next(x.shape for x in runner.session.session.get_outputs() if x.name == name)
    if len(shape) < 3:
        return (row,)  # labels of the whole row
    columns = new_columns(feeds, row, count)
    return row, offset if columns is None else columns.start + offset


def _feeds(
    runner: Runner, probe: Probe, tails: Sequence[Row], wanted: int
) -> dict[str, NDArray[Any]]:
    """All that one run of the graph is fed."""
    kept: dict[str, NDArray[Any]] = {}

    def listen(run: int, values: Mapping[str, Any]) -> None:
        if run == wanted:
            kept.update({name: np.array(value.numpy()) for name, value in values.items()})

    rerun(runner, probe, tails, listen)
    cache = runner.bundle.manifest.gives.cache
    if cache is not None and cache.kind == "shared":
        # Behind a row's past lies what earlier runs wrote there, which nothing reads.
        width = kept["input_ids"].shape[1]
        for row, total in enumerate(kept["attention_mask"].sum(1)):
            for name in filter(is_past, kept):
                kept[name][row, :, max(int(total) - width, 0) :] = 0
    return kept


def _bad(golden: Golden, row: int, outputs: FloatArray, tolerance: Tolerance) -> list[int]:
    """Positions beyond a limit."""
    within = _excess(golden, row, outputs, tolerance) <= 1
    return [place_of(golden.expected[row], int(index)) for index in np.flatnonzero(~within)]


def _excess(
    golden: Golden, row: int, outputs: FloatArray, tolerance: Tolerance
) -> NDArray[np.float64]:
    """``[P]``: the error at each kept position, beside its limit; infinite where it is NaN."""
    expected = golden.expected[row].first(len(outputs))
    limit, rms_limit = _limits(_floor(golden, row), tolerance)
    error = np.abs(kept(expected, outputs).astype(np.float64) - expected.reference)
    rms = np.sqrt(np.mean(error * error, axis=-1))
    excess = np.maximum(error.max(-1) / limit, rms / rms_limit)
    return np.where(np.isnan(excess), np.inf, excess)


def _floor(golden: Golden, row: int) -> Floor:
    return golden.floors[label(golden.probe.states[row])]


def _limits(floor: Floor, tolerance: Tolerance) -> tuple[float, float]:
    return tolerance.multiple * floor.logit, tolerance.multiple * floor.rms


def _write(
    stage: Path,
    target: Path,
    runner: Runner,
    golden: Golden,
    row: int,
    tolerance: Tolerance,
    shown: _Shown,
    divergence: Divergence | None,
) -> None:
    expected = golden.expected[row].first(shown.position + 1)
    position = len(expected.top1) - 1
    whole = np.arange(expected.reference.shape[1])
    columns = whole if expected.columns is None else expected.columns[position]
    limit, rms_limit = _limits(_floor(golden, row), tolerance)
    session = runner.session.session
    level = session.get_session_options().graph_optimization_level.name
    name = f"{golden.probe.name}, row {row}"
    case = {
        "case": name,
        "what": shown.what,
        "tokens": _tokens(shown.feeds),
        "graph": Path(
            os.path.relpath(runner.bundle.directory / runner.graph_file, target)
        ).as_posix(),
        "file": runner.graph_file,
        "provider": session.get_providers()[0],
        "optimization": level,
        "output": runner.bundle.manifest.gives.output,
        "index": list(shown.index),
        "best": int(expected.top1[position]),
        "limit": limit,
        "rms_limit": rms_limit,
    }
    np.savez(stage / "inputs.npz", **shown.feeds)  # type: ignore[arg-type]
    np.save(stage / "expected.npy", expected.reference[position])
    np.save(stage / "actual.npy", shown.actual[columns])
    np.save(stage / "columns.npy", columns)
    layers: dict[str, Any] = {"first": None, "text": "", "layers": [], "skipped": []}
    if divergence is not None:
        # JSON has no NaN and no infinity.
        plain = [dataclasses.asdict(layer) for layer in divergence.layers]
        layers = {
            "first": divergence.first,
            "text": divergence.text,
            "layers": [
                {k: v if k == "path" or math.isfinite(v) else None for k, v in layer.items()}
                for layer in plain
            ],
            "skipped": list(divergence.skipped),
        }
    for file, data in (("case.json", case), ("layers.json", layers)):
        (stage / file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (stage / "repro.py").write_text(_SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    found = divergence.text if divergence else "The layers were not compared."
    text = _README.format(case=name, what=shown.what, found=found, file=runner.graph_file)
    (stage / "README.txt").write_text(text, encoding="utf-8")


def _tokens(feeds: Mapping[str, NDArray[Any]]) -> list[list[int]]:
    ids = feeds.get("input_ids")
    return [] if ids is None else ids.tolist()
