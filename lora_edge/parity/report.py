"""The report of a check: its cases and what they say together, as data, JSON and text.

Knows nothing of how the figures were made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_edge.parity.case import Case, plain
from lora_edge.parity.plan.reach import Reach
from lora_edge.parity.table import drift_table, table

SCHEMA_VERSION = 2
Against = Literal["reference", "goldens"]


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
        left_out: names of the golden cases that the client, or the graph, cannot be asked.
        graph: the file of the graph that ran, where it is the one with fixed shapes.
    """

    provider: str
    optimization: str
    precision: str
    placement: Mapping[str, Mapping[str, int]] | None = None
    parts: int = 1
    client: str = ""
    left_out: tuple[str, ...] = ()
    graph: str = ""

    def to_data(self) -> dict[str, Any]:
        """As JSON-ready values; ``parts`` only where there are several, a client's only of one."""
        data = {"name": self.name, **plain(self)}
        if self.parts == 1:
            del data["parts"]
        if not self.client:
            del data["client"]
        if not self.graph:
            del data["graph"]
        if not self.client and not self.graph:
            del data["left_out"]
        return data

    @property
    def name(self) -> str:
        """Short and unique in a report, e.g. ``cpu, all``."""
        fixed = ", fixed shapes" if self.graph else ""
        return self.provider if self.client else f"{self.provider}, {self.optimization}{fixed}"


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
            "cases": [case.to_data() for case in self.cases],
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
        blocks = [table(title, cases) for title, cases in self._groups()]
        if self.drift:
            half = any(each.precision == "fp16" for each in self.sessions)
            what = "float16 against float32" if half else "int8 activations against floats"
            title = f"quantization drift: {what}, on the same weights"
            blocks.append(drift_table(title, self.drift))
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
