"""The base check of a graph without a cache: against eager PyTorch, before anything is built on it.

Covers what captures are known to get wrong: rows of unequal lengths padded on the right, one row,
rows longer than the traced one and than any attention window, token types, other sizes of batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.manifest import EncoderSpec
from lora_edge.errors import CaptureError
from lora_edge.parity.base.decoder import Captured, running, shortest_window
from lora_edge.parity.compare import Tolerance, noise
from lora_edge.parity.plan.states import prompts
from lora_edge.parity.task_reference import Row, TaskReference
from lora_edge.runtime.encoder import Encoder
from lora_edge.tasks.task import Task

_LENGTHS = (11, 40, 3, 24, 17, 6, 31, 9)  # unequal; what is longer than the model is cut
_IMAGES = 8
_ALWAYS = 600  # a window up to this is always run past


def check_encoder(
    graph: Captured[EncoderSpec],
    base: Base,
    task: Task,
    *,
    seed: int = 0,
    tolerance: Tolerance | None = None,
) -> dict[str, Any]:
    """Compare a captured graph, without adapters, with eager PyTorch in float32.

    Args:
        task: what it was captured for.
        graph, base, seed, tolerance: as :func:`~lora_edge.parity.base.decoder.check_decoder`.

    Returns:
        JSON-ready figures: floor, limit, each case's error, and what was covered of the window.

    Raises:
        CaptureError: a case is beyond its limit, or proves nothing; names the case.
    """
    tolerance = tolerance or Tolerance()
    spec = graph.spec
    window = _window(base.config)
    rows, longer, covered = _rows(spec, window, seed)
    reference = TaskReference(base, task)
    expected = reference.outputs([*rows, longer])
    with reference.wide():
        wide = reference.outputs(rows)
    del reference
    floor = noise([_table(x) for x in expected[:-1]], [_table(x) for x in wide])
    limit = tolerance.multiple * floor.logit
    whole = np.concatenate([_table(output) for output in expected])
    spread = float(np.sqrt(np.mean((whole - whole.mean(0)) ** 2)))
    if not spread * tolerance.sensitivity > floor.rms:
        raise CaptureError(
            f"the outputs of {base.name_or_path} differ from input to input by {spread:.1e} only "
            f"(floor {floor.rms:.1e}), so that a comparison proves nothing",
            "Are its weights trained?",
        )
    with running(base):
        encoder = Encoder(graph.path, spec)
    cases: dict[str, dict[str, float]] = {}
    for name, first, last in _cases(spec, len(rows)):
        batch = _batch(encoder, [*rows, longer][first:last])
        with running(base):
            got = encoder.run(batch)
        error = 0.0
        for row, output in zip(expected[first:last], got, strict=True):
            own = output[: len(row)] if row.ndim == 2 else output
            # fmax would drop a NaN; a NaN must reach the verdict
            error = float(np.maximum(error, np.abs(own - row).max()))
        if not error <= limit:
            raise CaptureError(
                f"the captured graph of {base.name_or_path} differs from PyTorch: {name}: error "
                f"{error:.1e} exceeds the limit {limit:.1e} (floor {floor.logit:.1e})",
                "Report the model; this capture is not used.",
            )
        cases[name] = {"error": error}
    return {
        "cases": cases,
        "floor": floor.logit,
        "limit": limit,
        "spread": spread,
        "longest_row": 0 if spec.image else len(longer["input_ids"]),
        "window": window,
        "window_covered": covered,
    }


def _cases(spec: EncoderSpec, rows: int) -> list[tuple[str, int, int]]:
    """Name, first and last of the rows."""
    if spec.image:
        return [(f"{rows} images", 0, rows), ("one image", rows, rows + 1)]
    return [
        ("rows padded on the right", 0, rows),
        ("one row", 0, 1),
        ("one longer row", rows, rows + 1),
    ]


def _rows(spec: EncoderSpec, window: int | None, seed: int) -> tuple[list[Row], Row, bool]:
    """Some rows, a longer one, and whether that one is past the window (true without one)."""
    random = np.random.default_rng(seed)
    if spec.image:
        shape = (_IMAGES + 1, *spec.image)
        images = random.standard_normal(shape).astype(np.float32)
        found: list[Row] = [{"pixel_values": image} for image in images]
        return found[:-1], found[-1], True
    length = 2 * max(_LENGTHS) + 5
    if window is not None and window <= _ALWAYS:
        length = max(length, window + 7)
    length = min(length, spec.max_length)
    ids = prompts(spec.vocab_size, (*_LENGTHS, length), seed=seed, longest=spec.max_length)
    rows: list[Row] = []
    for row in ids:
        arrays = {
            "input_ids": np.array(row, np.int64),
            "attention_mask": np.ones(len(row), np.int64),
            # The end of the row is of the second text.
            "token_type_ids": (np.arange(len(row)) >= random.integers(1, len(row) + 1)).astype(
                np.int64
            ),
        }
        rows.append({name: arrays[name] for name in spec.inputs})
    return rows[:-1], rows[-1], window is None or length > window


def _batch(encoder: Encoder, rows: Sequence[Row]) -> Mapping[str, NDArray[Any]]:
    if encoder.spec.image:
        return {"pixel_values": np.stack([row["pixel_values"] for row in rows])}
    types = None
    if "token_type_ids" in encoder.spec.inputs:
        types = [row["token_type_ids"].tolist() for row in rows]
    return encoder.feeds([row["input_ids"].tolist() for row in rows], types)


def _table(output: NDArray[Any]) -> NDArray[Any]:
    """``[positions, features]``."""
    return output.reshape(-1, output.shape[-1])


def _window(config: Mapping[str, Any]) -> int | None:
    """The attention window of a ``config.json``; ModernBERT's is counted in both directions."""
    return shortest_window(config) or (
        config["local_attention"] // 2 if config.get("local_attention") else None
    )
