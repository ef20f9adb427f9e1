"""The base check: a captured graph against eager PyTorch, before anything is built on it.

Covers what captures are known to get wrong: attention windows (sequences run past them), padded
batches of unequal rows on every side that the graph takes, the cache in decode steps, and a
continuation by several tokens at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.manifest import EncoderSpec, GraphSpec, Seq2SeqSpec
from lora_edge.errors import BundleError, CaptureError
from lora_edge.parity.compare import (
    Expected,
    FloatArray,
    Tolerance,
    expect,
    judge,
    limits,
    measure,
    noise,
)
from lora_edge.parity.plan.states import BASE, Row, prompts
from lora_edge.parity.reference import Reference
from lora_edge.runtime.decoder import Decoder

_Observed = tuple[str, list[int], list[FloatArray]]
_STEPS = 8  # decode steps after the prompt
_CONTINUED = 4  # tokens that are appended at once
_PLAIN_LENGTH = 40  # of the long row, when the model has no window
_ALWAYS = 600  # a window up to this is always run past
_AFFORDABLE = 2e11  # parameters x tokens beyond which a longer window is not
_ATTENTION_BYTES = 512 << 20  # of one layer's eager attention scores


Spec_co = TypeVar("Spec_co", bound=GraphSpec | EncoderSpec | Seq2SeqSpec, covariant=True)


class Captured(Protocol[Spec_co]):
    """What a base check needs of a capture."""

    @property
    def path(self) -> Path:
        """The ONNX file; of an encoder-decoder the encoder's, beside the decoder's."""

    @property
    def spec(self) -> Spec_co:
        """Its facts."""


def check_decoder(
    graph: Captured[GraphSpec], base: Base, *, seed: int = 0, tolerance: Tolerance | None = None
) -> dict[str, Any]:
    """Compare a captured graph, without adapters, with eager PyTorch in float32.

    Args:
        graph: the capture.
        base: the model that it was captured from.
        seed: of the random prompts.
        tolerance: how limits follow from the measured floor.

    Returns:
        JSON-ready figures: floor, limit, each case's errors, and what was covered of the window.

    Raises:
        CaptureError: a case is beyond its limit, or proves nothing; names the case.
    """
    tolerance = tolerance or Tolerance()
    reference = Reference(base)
    window = shortest_window(base.config)
    length, covered = _length(base, graph.spec, window, reference.parameters)
    rows = prompts(graph.spec.vocab_size, (length, 3), seed=seed, longest=length)
    tails = prompts(graph.spec.vocab_size, (_CONTINUED + _STEPS,) * 2, seed=seed + 1, longest=99)
    whole = [(*row, *tail) for row, tail in zip(rows, tails, strict=True)]
    states = (BASE, BASE)
    logits = [row.astype(np.float32) for row in reference.logits(whole, states)]
    # The floor is measured on the short row and the long one's beginning: float64 is slow.
    sample = [row[:_PLAIN_LENGTH] for row in whole]
    with reference.wide():
        wide = reference.logits(sample, states)
    floor = noise([row[:_PLAIN_LENGTH] for row in logits], wide)
    del reference
    cases: dict[str, dict[str, float]] = {}
    for name, start, actual in _running(observe(graph, rows, tails), base):
        expected = [
            _part(full, begin, got)
            for full, begin, got in zip(logits[: len(actual)], start, actual, strict=True)
        ]
        figures = measure(expected, actual, floor, tolerance)
        limit = limits(figures, floor, tolerance, has_effect=False)
        verdict = judge(name, figures, limit, tolerance, has_effect=False)
        if verdict.status != "passed":
            raise CaptureError(
                f"the captured graph of {base.name_or_path} differs from PyTorch: {verdict.reason}",
                "Try the other form or backend, and report the model; this capture is not used.",
            )
        cases[name] = {
            "logit_error": figures.logit_error,
            "relative_error": figures.effect_error,
            "relative_limit": limit.effect,
            "top1": figures.top1,
        }
    return {
        "cases": cases,
        "floor": floor.logit,
        "limit": tolerance.multiple * floor.logit,
        "longest_row": length + _CONTINUED + _STEPS,
        "window": window,
        "window_covered": covered,
    }


@contextlib.contextmanager
def running(base: Base) -> Iterator[None]:
    """What ONNX Runtime raises in the block where it cannot load or run a capture.

    Raises:
        CaptureError: names the architecture.
    """
    try:
        yield
    except (RuntimeError, BundleError) as error:
        said = " ".join(str(error).split())[:300]
        raise CaptureError(
            f"{base.model_type} models are refused: ONNX Runtime cannot run their captured graph: "
            f"{said}",
            "Try the other form or backend, and report the model; this capture is not used.",
        ) from error


def _running(cases: Iterator[_Observed], base: Base) -> Iterator[_Observed]:
    """The cases of a generator that runs a capture, with :func:`running`'s errors."""
    while True:
        with running(base):
            case = next(cases, None)
        if case is None:
            return
        yield case


def shortest_window(config: Mapping[str, Any]) -> int | None:
    """The attention window of a ``config.json``, if any layer has one."""
    text = config.get("text_config", config)
    window = text.get("sliding_window")
    used = text.get("use_sliding_window", True)
    return int(window) if isinstance(window, int) and window > 0 and used else None


def _length(base: Base, spec: GraphSpec, window: int | None, parameters: int) -> tuple[int, bool]:
    """Length of the long prompt, and whether it is past the window (true without one)."""
    most = max(4, spec.max_length - _CONTINUED - _STEPS)
    if window is None:
        return min(_PLAIN_LENGTH, most), True
    length = window + 7
    heads = int(base.config.get("num_attention_heads", 32))
    affordable = parameters * length <= _AFFORDABLE and 4 * heads * length**2 <= _ATTENTION_BYTES
    if length > most or not (window <= _ALWAYS or affordable):
        return min(_PLAIN_LENGTH, most), False
    return length, True


def observe(
    graph: Captured[GraphSpec], rows: Sequence[Row], tails: Sequence[Row]
) -> Iterator[_Observed]:
    """Each case's name, the first position of each row, and the graph's logits from there on."""
    spec = graph.spec
    sides: dict[str, GraphSpec] = {}
    if spec.padding != "left":
        sides["right"] = spec
    if spec.padding != "right":
        # A foreign graph's rows are laid out on the left; any graph that takes both must pass so.
        sides["left"] = replace(spec, form="foreign", padding="left")
    for side, layout in sides.items():
        decoder = Decoder(graph.path, layout)
        longest = max(map(len, rows)) + _CONTINUED + _STEPS
        decoding = decoder.start(len(rows), longest)
        starts = [0] * len(rows)
        yield f"prompt, padded on the {side}", starts, decoding.extend_all(rows)
        starts = [len(row) for row in rows]
        first = [tail[:_CONTINUED] for tail in tails]
        yield f"continuation after padding on the {side}", starts, decoding.extend_all(first)
        starts = [len(row) + _CONTINUED for row in rows]
        steps = [
            decoding.step([tail[_CONTINUED + step] for tail in tails]) for step in range(_STEPS)
        ]
        stacked = np.stack(steps, axis=1)
        yield f"decode after padding on the {side}", starts, list(stacked)
    decoder = Decoder(graph.path, next(iter(sides.values())))
    # Experts of a single token may be computed in another way than those of many.
    alone = decoder.start(1, len(rows[0]) + _CONTINUED)
    yield "prompt, one row", [0], alone.extend_all(rows[:1])
    steps = [alone.step([token]) for token in tails[0][:_CONTINUED]]
    yield "decode, one row", [len(rows[0])], list(np.stack(steps, axis=1))


def _part(logits: FloatArray, start: int, like: FloatArray) -> Expected:
    return expect(logits[start : start + len(like)])
