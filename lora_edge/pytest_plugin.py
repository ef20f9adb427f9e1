"""pytest plugin: a bundle's cases as tests of the user's own suite.

A test that takes the fixture ``lora_edge_case`` runs once for each case of the bundles named by the
mark ``lora_parity`` or by ``--lora-edge-bundle``. The bundle is validated when tests are collected,
once in a session (with pytest-xdist, once in each worker)::

    @pytest.mark.lora_parity("build/bundle", reference="models/base")
    def test_parity(lora_edge_case):
        lora_edge_case.check()

Nothing of lora-edge is loaded in suites that do not use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_MARK, _FIXTURE = "lora_parity", "lora_edge_case"
_REPORTS = pytest.StashKey[dict["_Wanted", dict[str, Any]]]()


@dataclass(frozen=True)
class _Wanted:
    """A validation that a test asks for; equal ones run once."""

    bundle: str
    reference: str | None
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    said: str = ""
    """The options as text: lists and dictionaries have no hash."""


@dataclass(frozen=True)
class ParityCase:
    """One case of a bundle's report.

    Attributes:
        report: the whole report, as ``lora_edge/reports/report.schema.json`` describes it.
        data: the case, of ``report["cases"]``.
    """

    report: Mapping[str, Any]
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What was run, e.g. ``adapter polite``."""
        return str(self.data["name"])

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that took part."""
        return tuple(self.data["adapters"])

    @property
    def passed(self) -> bool:
        """Whether it passed; an unproved case did not."""
        return bool(self.data["status"] == "passed")

    def check(self) -> None:
        """Fail the test where the case did not pass, with figures, layer and how to repeat it."""
        if not self.passed:
            from lora_edge.reports.junit import explain

            lines = f"{self.data['status']}: {explain(dict(self.report), self.data)}"
            pytest.fail(lines, pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--lora-edge-bundle``, ``--lora-edge-reference`` and ``--lora-edge-html``."""
    group = parser.getgroup("lora-edge", "parity of ONNX bundles with PyTorch")
    group.addoption(
        "--lora-edge-bundle",
        action="append",
        default=[],
        metavar="DIR",
        help=f"A bundle for the tests that take the fixture {_FIXTURE}. Repeatable.",
    )
    group.addoption(
        "--lora-edge-reference",
        metavar="BASE",
        help="Compare these bundles with PyTorch: the base's folder or id; else their goldens.",
    )
    group.addoption(
        "--lora-edge-html",
        metavar="FILE",
        help="Write the report as a page (of a second bundle to FILE-2, and so on).",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark."""
    config.addinivalue_line(
        "markers",
        f"{_MARK}(bundle, reference=None, **options): the bundle whose cases the fixture "
        f"{_FIXTURE} gives, one for each test; options go to lora_edge.validate().",
    )
    config.stash[_REPORTS] = {}


@pytest.fixture
def lora_edge_case(request: pytest.FixtureRequest) -> ParityCase:
    """One case of a bundle; ``check()`` fails the test where it did not pass."""
    case: ParityCase = request.param
    return case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Validate the bundles that a test names, and make a test of each case."""
    if _FIXTURE not in metafunc.fixturenames:
        return
    wanted = list(_wanted(metafunc))
    if not wanted:
        pytest.fail(
            f"{metafunc.definition.nodeid} takes {_FIXTURE}, and no bundle is named: mark it with "
            f"@pytest.mark.{_MARK}(DIR), or give --lora-edge-bundle DIR",
            pytrace=False,
        )
    cases, names = [], []
    for each in wanted:
        report = _validated(metafunc.config, each)
        prefix = f"{Path(each.bundle).name}: " if len(wanted) > 1 else ""
        several = len(report["sessions"]) > 1
        for case in report["cases"]:
            session = f" ({case['session']})" if several and case["session"] else ""
            cases.append(ParityCase(report, case))
            names.append(f"{prefix}{case['name']}{session}")
    metafunc.parametrize(_FIXTURE, cases, ids=names, indirect=True)


def _wanted(metafunc: pytest.Metafunc) -> Iterator[_Wanted]:
    marks = list(metafunc.definition.iter_markers(_MARK))
    for mark in marks:
        options = dict(mark.kwargs)
        bundle = mark.args[0] if mark.args else options.pop("bundle", None)
        if bundle is None:
            pytest.fail(f"@pytest.mark.{_MARK} names no bundle", pytrace=False)
        reference = options.pop("reference", None)
        known = None if reference is None else os.fspath(reference)
        yield _Wanted(os.fspath(bundle), known, options, repr(sorted(options.items())))
    if not marks:
        for bundle in metafunc.config.getoption("--lora-edge-bundle"):
            yield _Wanted(bundle, metafunc.config.getoption("--lora-edge-reference"))


def _validated(config: pytest.Config, wanted: _Wanted) -> dict[str, Any]:
    reports = config.stash[_REPORTS]
    if wanted not in reports:
        from lora_edge.errors import LoraEdgeError
        from lora_edge.parity import validate

        try:
            found = validate(wanted.bundle, wanted.reference, **wanted.options)
        except LoraEdgeError as error:
            pytest.fail(f"lora-edge: {error} {error.hint}", pytrace=False)
        reports[wanted] = found.to_data()
    return reports[wanted]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the pages; with pytest-xdist the first worker does."""
    file = session.config.getoption("--lora-edge-html")
    worker = getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"]
    if file is None or worker != "gw0":
        return
    from lora_edge.files.transaction import write_atomically
    from lora_edge.reports import html

    for number, data in enumerate(session.config.stash[_REPORTS].values(), 1):
        path = Path(file)
        if number > 1:
            path = path.with_name(f"{path.stem}-{number}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, html(data))
