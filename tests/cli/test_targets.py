"""``lora-edge targets``, and what ``export --target`` and ``run --provider`` refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_edge.runtime import providers
from lora_edge.targets.table import TARGETS
from tests.support.commands import Cli


@pytest.fixture(autouse=True)
def _only_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "available", lambda: ("cpu",))


def test_all_are_shown_with_what_runs_here(cli: Cli) -> None:
    result = cli("targets")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert [x.split()[0] for x in lines if x[0] != " "] == [each.name for each in TARGETS]
    assert lines[0].split()[:2] == ["cpu", "yes"]
    cuda = next(index for index, line in enumerate(lines) if line.startswith("cuda "))
    assert "no" in lines[cuda].split()
    assert "it is not in the installed onnxruntime" in lines[cuda + 1]
    assert "pip install onnxruntime-gpu" in lines[cuda + 2]


def test_json_has_every_field(cli: Cli) -> None:
    result = cli("targets", "--json")
    rows = json.loads(result.out)
    assert (result.code, [row["name"] for row in rows]) == (0, [each.name for each in TARGETS])
    assert all({*TARGETS[0]._fields, "here"} == {*row} for row in rows)
    assert rows[0]["here"] == {"runs": True, "reason": "", "way": ""}
    assert json.loads(cli("targets", "coreml", "--json").out)["defaults"] == {
        "ModelFormat": "MLProgram"
    }


@pytest.mark.parametrize("name", [each.name for each in TARGETS])
def test_a_name_shows_all_that_is_known_of_it(cli: Cli, name: str) -> None:
    result = cli("targets", name)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{name}: ")
    assert "None" not in result.out
    assert max(len(line) for line in result.out.splitlines() if line[:1] != "→") <= 80


def test_what_is_known_and_what_is_not_are_told_apart(cli: Cli) -> None:
    told, _, unknown = cli("targets", "OpenVINOExecutionProvider").out.partition("Not known: ")
    assert "It takes tensors with a zero-size dimension." in told
    assert "onnxruntime-ep-openvino (pip, beside" in " ".join(told.split())
    assert "how its device is found" in unknown
    assert "Not known" not in cli("targets", "cpu").out
    assert "It was not run yet." in cli("targets", "tensorrt").out
    assert "It takes graphs with fixed shapes only." in cli("targets", "qnn").out


def test_an_unknown_name_is_one_line(cli: Cli) -> None:
    result = cli("targets", "abacus")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: there is no target 'abacus'\nhint: Targets are cpu, ")


def test_a_provider_that_is_not_there_is_refused_with_its_line(cli: Cli, bundle: Path) -> None:
    result = cli("run", bundle, "--provider", "openvino", "-p", "a")
    assert (result.code, result.out) == (2, "")
    assert "'openvino' is not in this installation of ONNX Runtime; available: cpu" in result.err
    assert "pip install onnxruntime-openvino" in result.err


@pytest.mark.parametrize(
    ("given", "error", "hint"),
    [
        (["abacus"], "no target 'abacus'", "Targets are cpu"),
        (["cpu,qnn", "--precision", "fp16"], "in fp32, got --precision fp16", "fp32"),
        (["cpu", "--rank", "4"], "rank is 4, expected none but", "--static or --target qnn"),
        (["webgpu", "--form", "fused"], "--form fused is not for webgpu", "--form portable"),
        (["coreml", "--precision", "int4"], "no weights in int4", "--precision fp32 or fp16"),
        (["openvino", "--backend", "optimum"], "optimum backend does not make", "trace"),
    ],
)
def test_an_export_for_what_does_not_take_it_is_refused(
    cli: Cli, base: Path, tmp_path: Path, given: list[str], error: str, hint: str
) -> None:
    result = cli("export", base, "-o", tmp_path / "out", "--target", *given)
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert error in first
    assert hint in second
    assert not (tmp_path / "out").exists()
