"""What a capture is run on, and how its outputs are judged."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.part import Beginning, Part
from lora_edge.errors import BundleError, CaptureError
from lora_edge.maths.lora import FloatArray
from lora_edge.parity.compare import Floor, Tolerance, expect, judge, limits, measure
from lora_edge.parity.plan.states import Inputs
from lora_edge.runtime.segmented import Cut


class Captured(Protocol):
    """What a base check needs of a capture."""

    @property
    def folder(self) -> Path:
        """Where the ONNX files are."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """Name -> the graph's facts."""

    @property
    def beginning(self) -> Beginning | None:
        """What an encoder-decoder's answer begins with."""


@dataclass(frozen=True)
class Observed:
    """One run of the capture.

    Attributes:
        name: what it exercises.
        places: for each row of the run, which of the trial's rows it is, and from which position.
        outputs: of each row of the run, ``[positions, columns]``.
    """

    name: str
    places: Sequence[tuple[int, int]]
    outputs: Sequence[FloatArray]


class Trial(ABC):
    """A capture, and the rows that it is run on.

    Attributes:
        rows: what PyTorch reads, one row each.
        longest: positions of a row on which the floor is measured; None: all.
        measured: number of rows on which it is; None: all.
        cut: how the graphs are cut into parts, of a large model; None: they run whole.
    """

    rows: Sequence[Inputs]
    longest: int | None = None
    measured: int | None = None
    cut: Cut | None = None

    @abstractmethod
    def __init__(self, graph: Captured, base: Base, parameters: int, seed: int) -> None:
        """Choose the rows; ``parameters`` is the size of the model."""

    @abstractmethod
    def cases(self) -> Iterator[Observed]:
        """Run the capture."""

    def senseless(
        self,
        expected: Sequence[FloatArray],  # noqa: ARG002
        floor: Floor,  # noqa: ARG002
        tolerance: Tolerance,  # noqa: ARG002
    ) -> str:
        """Why the comparison would prove nothing, before the capture is run; empty: it would."""
        return ""

    def judged(
        self, case: Observed, wanted: Sequence[FloatArray], floor: Floor, tolerance: Tolerance
    ) -> tuple[str, dict[str, float]]:
        """Why a run is wrong, empty where it is right; and its figures."""
        figures = measure([expect(row) for row in wanted], case.outputs, floor, tolerance)
        limit = limits(figures, floor, tolerance, has_effect=False)
        verdict = judge(case.name, figures, limit, tolerance, has_effect=False)
        reason = "" if verdict.status == "passed" else verdict.reason
        return reason, {
            "logit_error": figures.logit_error,
            "relative_error": figures.effect_error,
        }

    def facts(self) -> dict[str, Any]:
        """What was covered, JSON-ready."""
        return {}


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
