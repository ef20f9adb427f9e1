"""Validation in other runtimes, by the driver that needs no more than this environment."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import lora_edge
from lora_edge.bundle.bundle import load_bundle
from lora_edge.cli.validate import command as validate_command
from lora_edge.clients.catalog import CLIENTS, COMMAND, ClientKind
from lora_edge.clients.process import ProcessError
from lora_edge.errors import BundleError, DataError, OptionError
from lora_edge.parity.report import Report
from lora_edge.parity.validate_in import validate_in
from lora_edge.reports import html, junit, markdown
from tests.reports.test_formats import SCHEMA
from tests.support import shipped
from tests.support.examples import examples
from tests.support.faulty_client import FAULTS
from tests.support.kinds import make_kinds
from tests.support.paths import ROOT

PLAIN = "onnxruntime"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    found: dict[str, Path] = {}

    def make(precision: Any) -> Path:
        if precision not in found:
            output = tmp_path_factory.mktemp(precision) / "bundle"
            found[precision] = shipped.export_text(output, precision=precision)
        return found[precision]

    return make


def _failing(fault: str, bundle: Path) -> Report:
    program = shlex.join([sys.executable, str(ROOT / "tests/support/faulty_client.py"), fault])
    return validate_in({COMMAND + program: None}, bundle, depth="quick")


@pytest.mark.parametrize("precision", examples(["fp32", "int4", "fp16"], ["fp32", "int4"]))
def test_plain_onnxruntime_does_what_the_runner_does(
    precision: str, made: Callable[[str], Path]
) -> None:
    bundle = made(precision)
    found = validate_in({PLAIN: None}, bundle)
    assert found.passed, found.table()
    (session,) = found.sessions
    assert session.name == PLAIN
    assert session.client.startswith("onnxruntime 1.")
    own = lora_edge.validate(bundle)
    kinds = {"adapter", "base", "blend", "mixed", "switch", "drift"}
    assert [case.name for case in found.cases if case.kind in kinds] == [
        case.name for case in own.cases if case.kind in kinds
    ]
    assert all(case.session == PLAIN for case in found.cases if case.kind in kinds)


@pytest.mark.parametrize("kind", CLIENTS, ids=lambda kind: kind.name)
def test_a_client_has_its_driver_and_is_named_where_one_looks(kind: ClientKind) -> None:
    assert (ROOT / "lora_edge" / "clients" / "drivers" / kind.driver).is_file()
    assert f"| `{kind.name}` |" in (ROOT / "docs" / "clients.md").read_text()
    (option,) = (x for x in validate_command.params if x.name == "inside")
    assert kind.name in re.split(r", (?:or )?|: ", str(getattr(option, "help", "")))


def test_every_kind_of_adapter(tmp_path: Path) -> None:
    names = ("dora", "lora-bias", "saved-norms", "embedding", "tokens", "alora")
    base, adapters = make_kinds("llama", tmp_path, names)
    lora_edge.export(base, adapters, output=tmp_path / "out")
    found = validate_in({PLAIN: None}, tmp_path / "out")
    assert found.passed, found.table()
    assert {f"adapter {name}" for name in names} <= {case.name for case in found.cases}


def test_heads_of_unequal_sizes(tmp_path: Path) -> None:
    found = validate_in({PLAIN: None}, shipped.export_heads(tmp_path / "out"))
    assert found.passed, found.table()


@pytest.mark.parametrize("fault", [name for name, fault in FAULTS.items() if fault.case])
def test_a_fault_of_a_client_is_found_and_explained(
    fault: str, made: Callable[[str], Path]
) -> None:
    found = _failing(fault, made("int4" if fault == "another graph" else "fp32"))
    assert not found.passed
    case = next(case for case in found.failures if case.name == FAULTS[fault].case)
    assert FAULTS[fault].said in case.reason
    right = "lora-edge's own runner is right with the same files: it is python"
    assert fault in ("first token lost", "another graph") or right in case.reason


def test_a_client_that_dies_is_told_with_what_it_said(made: Callable[[str], Path]) -> None:
    with pytest.raises(
        ProcessError, match=r"python.* faulty_client\.py: its process died: .*memory"
    ):
        _failing("dies", made("fp32"))


@pytest.mark.parametrize(
    "file", ["genai_config.json", "config.json", "adapters/echo/adapter.onnx_adapter"]
)
def test_a_file_that_was_changed_is_found_before_a_client_reads_it(
    file: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(made("fp32"), tmp_path / "bundle"))
    content = (bundle / file).read_bytes()
    if file.endswith("_adapter"):
        content = (bundle / "adapters/mirror/adapter.onnx_adapter").read_bytes()
    (bundle / file).write_bytes(content + b" " * (not file.endswith("_adapter")))
    with pytest.raises(BundleError, match=f"{file} differs from its hash"):
        validate_in({PLAIN: None}, bundle)


def test_the_reports_show_it(made: Callable[[str], Path]) -> None:
    report = _failing("not fed", made("fp32"))
    data = json.loads(report.to_json())
    jsonschema.validate(data, SCHEMA)
    client = data["sessions"][0]["client"]
    assert client.startswith("onnxruntime 1.")
    for written in (html(data, []), junit(data, []), markdown(data, [])):
        assert "faulty_client.py" in written
    assert client in html(data, [])


def test_what_is_missing_is_told(made: Callable[[str], Path]) -> None:
    with pytest.raises(DataError, match="no client"):
        validate_in({}, made("fp32"))
    bundle = load_bundle(made("fp32"))
    parts = {**bundle.manifest.parts, "encoder": bundle.manifest.parts["decoder"]}
    two = dataclasses.replace(bundle.manifest, parts=parts)
    with pytest.raises(OptionError, match="encoder-decoders are not run in clients"):
        validate_in({PLAIN: None}, dataclasses.replace(bundle, manifest=two))
