"""The report of a check: data, JSON, and a table for a terminal.

Knows nothing of how the figures were made.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_edge.parity.compare import Figures, Limits, Status
from lora_edge.parity.plan.reach import Reach

SCHEMA_VERSION = 2
Against = Literal["reference", "goldens"]
CaseKind = Literal[
    "base", "adapter", "blend", "mixed", "switch", "task", "proof", "around", "weights", "drift"
]

_DRIFT_HEADER = (
    "case", "effect error", "effect", "KL", "limit", "top-1", "cosine", "limit", "perplexity",
    "in floats", "",
)  # fmt: skip
_HEADER = ("case", "logit error", "limit", "effect error", "limit", "effect", "top-1", "KL", "")


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
class Session:
    """One way in which the bundle was run.

    Attributes:
        provider: execution provider, e.g. ``cpu``.
        optimization: ONNX Runtime's graph optimizations: ``disable``, ``basic``, ``extended`` or
            ``all``.
        precision: of the graph's weights, e.g. ``fp32``.
        placement: provider -> operator -> nodes that it ran; ``None`` where ONNX Runtime does not
            tell.
        parts: in how many parts its graphs ran, whose weights were in memory in turns.
        client: of another runtime than lora-edge's own, what it is and its version; the provider is
            then its short name, and the optimization is its own affair.
        left_out: names of the golden cases that the client cannot be asked.
    """

    provider: str
    optimization: str
    precision: str
    placement: Mapping[str, Mapping[str, int]] | None = None
    parts: int = 1
    client: str = ""
    left_out: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """As JSON-ready values; ``parts`` only where there are several, a client's only of one."""
        data = {"name": self.name, **_plain(self)}
        if self.parts == 1:
            del data["parts"]
        if not self.client:
            del data["client"], data["left_out"]
        return data

    @property
    def name(self) -> str:
        """Short and unique in a report, e.g. ``cpu, all``."""
        return self.provider if self.client else f"{self.provider}, {self.optimization}"


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


@dataclass(frozen=True)
class Report:
    """What a validation found.

    Attributes:
        bundle: the bundle's folder.
        mode: ``switchable`` or ``merged``.
        against: where the expected outputs came from: PyTorch now, or the recorded goldens.
        adapters: names of the bundle's adapters.
        cases: every comparison.
        versions: packages and versions of both sides.
        seconds: how long it took.
        sessions: the ways in which the bundle was run.
        machine: ``system``, ``machine``, ``processor``, ``cores``, ``python``.
        settings: what was asked for: ``depth``, ``steps``, ``seed``, ``multiple``,
            ``sensitivity``.
        base: name of the base model.
        command: a command line that makes the report again, but for prompts and examples of the
            user's own.
        repro: folder of the reproduction of the first failure; empty where there is none.
        reach: how far the run went, and where it did not go.
        survival: what the export measured of a merged adapter whose layers were rounded; empty:
            none were.
    """

    bundle: str
    mode: str
    against: Against
    adapters: tuple[str, ...]
    cases: tuple[Case, ...]
    versions: Mapping[str, str]
    seconds: float
    sessions: tuple[Session, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str | int | float | None] = field(default_factory=dict)
    base: str = ""
    command: str = ""
    repro: str = ""
    reach: Reach | None = None
    survival: str = ""

    @property
    def passed(self) -> bool:
        """Every case passed; an unproved one is not a pass, and neither is an empty report."""
        return bool(self.cases) and all(case.status == "passed" for case in self.cases)

    @property
    def failures(self) -> tuple[Case, ...]:
        """The cases that failed or are unproved."""
        return tuple(case for case in self.cases if case.status != "passed")

    @property
    def drift(self) -> tuple[Case, ...]:
        """What int8 activations add; every other case is about the graph in floats."""
        return tuple(case for case in self.cases if case.kind == "drift")

    @property
    def exact(self) -> bool:
        """Every case passed but for drift."""
        cases = [case for case in self.cases if case.kind != "drift"]
        return bool(cases) and all(case.status == "passed" for case in cases)

    def adapter_passed(self, name: str) -> bool:
        """The adapter was compared on its own, and every case that it took part in passed.

        A case that it shares with an adapter that fails alone does not count against it, nor does a
        metric of the user's that cannot tell, nor drift.
        """
        around = [case for case in self.cases if case.kind in {"around", "weights"}]
        if any(case.status == "failed" and not case.adapters for case in around):
            return False  # what all adapters share is not PyTorch's
        cases = [case for case in self.cases if case.kind != "drift"]
        told = [case for case in cases if case.kind != "task" or case.status != "unproved"]
        failed = [case for case in told if case.status != "passed"]
        broken = {case.adapters for case in failed if len(case.adapters) == 1}
        alone_broken = {case.adapters for case in failed if case.kind == "adapter"}
        mine = [
            case
            for case in told
            if name in case.adapters
            # NaN of one adapter reaches all rows of its batch.
            and not (case.kind == "mixed" and alone_broken - {(name,)})
            and not any((other,) in broken for other in case.adapters if other != name)
        ]
        alone = any(case.adapters == (name,) and case.figures for case in mine)
        return alone and all(case.status == "passed" for case in mine)

    def to_data(self) -> dict[str, Any]:
        """The report as JSON-ready values, as ``reports/report.schema.json`` describes them.

        NaN and Inf are ``None``.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "summary": self.summary(),
            "bundle": self.bundle,
            "base": self.base,
            "mode": self.mode,
            "against": self.against,
            "adapters": list(self.adapters),
            "sessions": [each.to_data() for each in self.sessions],
            "cases": [_case(case) for case in self.cases],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "command": self.command,
            "repro": self.repro,
            "reach": None if self.reach is None else self.reach.to_data(),
            "survival": self.survival,
            "seconds": round(self.seconds, 3),
        }

    def to_json(self) -> str:
        """:meth:`to_data` as indented JSON."""
        return json.dumps(self.to_data(), indent=1, allow_nan=False) + "\n"

    def table(self) -> str:
        """A table per adapter, then one line per failure, the verdict, and how far it goes."""
        blocks: list[str] = []
        for title, cases in self._groups():
            rows = [_HEADER, *(_cells(case) for case in cases)]
            blocks.append("\n".join([title, *_columns(rows)]))
        if self.drift:
            half = any(each.precision == "fp16" for each in self.sessions)
            what = "float16 against float32" if half else "int8 activations against floats"
            title = f"quantization drift: {what}, on the same weights"
            rows = [_DRIFT_HEADER, *map(_drift_cells, self.drift)]
            blocks.append("\n".join([title, *_columns(rows)]))
        lines = [f"{case.status}: {case.reason}" for case in self.failures]
        if lines:
            blocks.append("\n".join(lines))
        end = [self.summary()]
        end += [
            f"not run in {each.name}, which cannot be asked: {', '.join(each.left_out)}"
            for each in self.sessions
            if each.left_out
        ]
        if self.reach is not None:
            end.append(self.reach.line())
        if self.survival:
            end.append(self.survival)
        return "\n\n".join([*blocks, "\n".join(end)]) + "\n"

    def summary(self) -> str:
        """The verdict in one line."""
        source = "PyTorch" if self.against == "reference" else "the recorded goldens"
        cases = [case for case in self.cases if case.kind != "drift"]
        good = sum(case.status == "passed" for case in cases)
        verdict = "passed" if self.passed else "NOT PASSED"
        within = sum(case.status == "passed" for case in self.drift)
        drift = f"; drift within its limits in {within} of {len(self.drift)}" if self.drift else ""
        return (
            f"{verdict}: {good} of {len(cases)} cases against {source}{drift}, {self.seconds:.1f} s"
        )

    def _groups(self) -> list[tuple[str, list[Case]]]:
        groups: dict[str, list[Case]] = {}
        for case in self.cases:
            if case.kind == "drift":
                continue
            if not case.adapters:
                title = "no adapter"
            elif len(case.adapters) == 1 and case.kind not in {"blend", "mixed"}:
                title = f"adapter {case.adapters[0]}"
            else:
                title = "several adapters"
            if len(self.sessions) > 1 and case.session:
                title += f" ({case.session})"
            groups.setdefault(title, []).append(case)
        return list(groups.items())


def _case(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "kind": case.kind,
        "session": case.session,
        "adapters": list(case.adapters),
        "status": case.status,
        "reason": case.reason,
        "figures": None if case.figures is None else _plain(case.figures),
        "limits": None if case.limits is None else _plain(case.limits),
        "controls": None if case.controls is None else _finite(dict(case.controls)),
        "layers": [_plain(layer) for layer in case.layers],
        "task": None if case.task is None else _plain(case.task),
        "drift": None if case.drift is None else _plain(case.drift),
    }


def _plain(value: Any) -> Any:
    return _finite(dataclasses.asdict(value))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _cells(case: Case) -> tuple[str, ...]:
    figures, limits = case.figures, case.limits
    verdict = case.status if case.status == "passed" else case.status.upper()
    if figures is None or limits is None:
        return (case.name, *[""] * 7, verdict)
    return (
        case.name,
        f"{figures.logit_error:.1e}",
        f"{limits.logit:.1e}",
        f"{figures.effect_error:.1e}",
        f"{limits.effect:.1e}",
        f"{figures.effect_max:.3g}" if figures.effect_max else "-",
        f"{figures.top1:.1%}",
        f"{figures.kl:.1e}",
        verdict,
    )


def _drift_cells(case: Case) -> tuple[str, ...]:
    figures = case.drift
    assert figures is not None
    name = f"{case.name.removeprefix('drift, ')} ({case.session})"
    return (
        name,
        f"{figures.effect_error:.1e}",
        _or_dash(figures.retained, ".1%"),
        _or_dash(figures.kl, ".1e"),
        _or_dash(figures.kl_limit, ".1e"),
        _or_dash(figures.top1, ".1%"),
        _or_dash(figures.cosine, ".6f"),
        _or_dash(figures.cosine_limit, ".2f"),
        _or_dash(figures.perplexity, ".4g"),
        _or_dash(figures.exact_perplexity, ".4g"),
        case.status if case.status == "passed" else case.status.upper(),
    )


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if i in {0, len(row) - 1} else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
