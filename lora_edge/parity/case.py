"""One comparison: its figures, its verdict, and both as data.

Knows nothing of how the figures were made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_edge.parity.compare import Figures, Limits, Status

CaseKind = Literal[
    "base", "adapter", "blend", "mixed", "switch", "task", "proof", "around", "weights", "drift"
]


@dataclass(frozen=True)
class Layer:
    """How far one layer's output is from PyTorch's, on the row of a case that failed.

    Attributes:
        path: module path.
        error: ``||y - y_ref|| / ||y_ref||``.
        floor: the same of PyTorch in float32 against float64.
        limit: what ``error`` may be.
    """

    path: str
    error: float
    floor: float
    limit: float


@dataclass(frozen=True)
class TaskFigures:
    """A metric on the user's own examples, under PyTorch and under the bundle.

    Attributes:
        metric: ``exact_match``, ``accuracy`` or ``perplexity``.
        examples: how many.
        reference: the metric under PyTorch.
        bundle: the metric under the bundle.
        base: the metric under PyTorch without the adapter.
        better: examples on which the bundle does better than PyTorch.
        worse: examples on which it does worse.
        p: two-sided probability of so unequal a split if neither were better (sign test).
    """

    metric: str
    examples: int
    reference: float
    bundle: float
    base: float
    better: int
    worse: int
    p: float


@dataclass(frozen=True)
class DriftFigures:
    """What int8 activations or float16 add: the graph that ships against the one in floats, on
    equal weights.

    Attributes:
        positions: number of compared positions.
        logit_error: largest absolute difference of an output.
        effect_error: error relative to the adapter's effect; without an adapter, to the spread of
            the outputs.
        retained: share of the adapter's effect that is there (1: all); ``nan`` without an adapter.
        kl: mean KL divergence, in nats, of the distribution over tokens or labels; ``nan`` where
            the outputs are embeddings.
        top1: share of positions with the same best token or label; ``nan`` as above.
        perplexity: of the greedy continuations of the goldens; ``nan`` where there are none.
        exact_perplexity: the same in floats.
        kl_limit: largest ``kl`` that passes; ``nan`` as above.
        retained_limit: smallest ``retained`` that passes.
        cosine: mean cosine of the embeddings of a token; ``nan`` where the outputs are no
            embeddings.
        cosine_limit: smallest ``cosine`` that passes; ``nan`` as above.
        largest: largest number that float16 is to hold, of all values of the graph, in float32;
            ``nan`` where it was not measured.
    """

    positions: int
    logit_error: float
    effect_error: float
    retained: float
    kl: float
    top1: float
    perplexity: float
    exact_perplexity: float
    kl_limit: float
    retained_limit: float
    cosine: float = math.nan
    cosine_limit: float = math.nan
    largest: float = math.nan


@dataclass(frozen=True)
class Case:
    """One comparison and its verdict.

    Attributes:
        name: what was run, e.g. ``adapter polite``.
        adapters: the adapters that took part; empty: the base.
        status: ``passed``, ``failed`` or ``unproved``; only ``passed`` is good.
        reason: one line that names the adapter and the figures; empty when passed.
        figures: what was measured; ``None`` for a comparison bit for bit, or one that did not run.
        limits: floors and limits it was judged by; ``None`` as above.
        controls: deliberate fault -> the error measured with it, which must exceed the limit.
        kind: what was exercised.
        session: name of the session that ran it; empty where none did.
        layers: of a case that failed, the layers in the order in which they run, up to the first
            that differs and a few beyond; empty where they were not compared.
        task: what ``--eval`` measured; ``None`` elsewhere.
        drift: what int8 activations add, of a case of that kind; ``None`` elsewhere.
    """

    name: str
    adapters: tuple[str, ...]
    status: Status
    reason: str = ""
    figures: Figures | None = None
    limits: Limits | None = None
    controls: Mapping[str, float] | None = None
    kind: CaseKind = "base"
    session: str = ""
    layers: tuple[Layer, ...] = ()
    task: TaskFigures | None = None
    drift: DriftFigures | None = None

    def to_data(self) -> dict[str, Any]:
        """The case as JSON-ready values; NaN and Inf are ``None``."""
        return {
            "name": self.name,
            "kind": self.kind,
            "session": self.session,
            "adapters": list(self.adapters),
            "status": self.status,
            "reason": self.reason,
            "figures": None if self.figures is None else plain(self.figures),
            "limits": None if self.limits is None else plain(self.limits),
            "controls": None if self.controls is None else _finite(dict(self.controls)),
            "layers": [plain(layer) for layer in self.layers],
            "task": None if self.task is None else plain(self.task),
            "drift": None if self.drift is None else plain(self.drift),
        }


def plain(value: Any) -> Any:
    """The fields of a dataclass; NaN and Inf are ``None``."""
    return _finite(dataclasses.asdict(value))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
