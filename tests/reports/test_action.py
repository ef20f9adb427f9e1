"""The composite action's own shell steps, in a scratch repository: green, red, regression."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from junitparser import JUnitXml

from tests.support.paths import ROOT

ACTION = ROOT / "ci" / "action" / "action.yml"


class Job:
    """A job of a runner: the action's inputs in, exit code and files out."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.summary = repository.parent / "summary.md"
        self.output = repository / "lora-edge-report"
        action = yaml.safe_load(ACTION.read_text())
        self._inputs = action["inputs"]
        self._steps = {step["name"]: step for step in action["runs"]["steps"] if "run" in step}
        subprocess.run(["git", "init", "--quiet", str(repository)], check=True)

    def run(self, step: str = "Validate", **given: object) -> int:
        """Run a step as a runner does; ``Validate`` where the package is installed already."""
        known = {"github.action_path": str(ACTION.parent)}
        for name, facts in self._inputs.items():
            known[f"inputs.{name}"] = str(given.pop(name, facts.get("default", "")))
            assert known[f"inputs.{name}"] or not facts.get("required"), name
        assert not given
        named = {
            key: known[value.removeprefix("${{ ").removesuffix(" }}")]
            for key, value in self._steps[step]["env"].items()
        }
        folders = (self.repository.parent, Path(sys.executable).parent, os.environ["PATH"])
        named |= {
            "PATH": os.pathsep.join(map(str, folders)),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", self._steps[step]["run"]],
            cwd=self.repository,
            env={**os.environ, **named},
            check=False,
        ).returncode


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "repository")


@pytest.mark.parametrize(
    ("given", "there", "wanted"),
    [
        ({}, False, "[cpu]"),
        ({}, True, None),  # perhaps onnxruntime-gpu's, which is not written over
        ({"reference": "models/base"}, False, "[cpu,export]"),
        ({"reference": "models/base"}, True, "[export]"),
        ({"install": "lora-edge==1"}, False, "lora-edge==1"),
    ],
)
def test_it_installs_what_it_came_with(
    job: Job, tmp_path: Path, given: dict[str, str], there: bool, wanted: str | None
) -> None:
    """No name is asked of a registry that somebody else could hold there."""
    python = tmp_path / "python"  # says what it was asked instead of installing it
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exit {0 if there else 1}\n'
        f'printf "%s\\n" "$@" > "{tmp_path}/asked"\n'
    )
    python.chmod(0o755)
    assert job.run("Install", bundle="bundle", **given) == 0
    *command, asked = (tmp_path / "asked").read_text().splitlines()
    assert command == ["-m", "pip", "install", "--quiet"]
    if "install" in given:
        assert asked == wanted
        return
    folder, bracket, extra = asked.partition("[")
    assert (Path(folder) / "pyproject.toml").samefile(ACTION.parents[2] / "pyproject.toml")
    assert bracket + extra == (wanted or "")


def test_green_on_a_good_bundle(job: Job, bundle: Path) -> None:
    shutil.copytree(bundle, job.repository / "bundle")
    assert job.run(bundle="bundle", options="--quick") == 0
    assert job.summary.read_text().startswith("## ✅ lora-edge")
    assert JUnitXml.fromfile(str(job.output / "junit.xml")).failures == 0
    assert "✓ passed" in (job.output / "report.html").read_text(encoding="utf-8")
    data = json.loads((job.output / "report.json").read_text())
    assert data["settings"]["depth"] == "quick"


def test_in_another_runtime(job: Job, bundle: Path, faulty: Path) -> None:
    given = {"in": "onnxruntime", "clients": f"onnxruntime={sys.executable}", "options": "--quick"}
    assert job.run(bundle=bundle, **given) == 0
    data = json.loads((job.output / "report.json").read_text())
    assert [session["name"] for session in data["sessions"]] == ["onnxruntime"]
    assert job.run(bundle=faulty, **given) == 1


def test_red_on_a_faulty_one(job: Job, faulty: Path) -> None:
    shutil.copytree(faulty, job.repository / "bundle")
    assert job.run(bundle="bundle") == 1
    assert job.summary.read_text().startswith("## ❌ lora-edge")
    parsed = JUnitXml.fromfile(str(job.output / "junit.xml"))
    failed = {test.name for suite in parsed for test in suite if not test.is_passed}
    assert "adapter mirror" in failed
    assert "adapter echo" not in failed


def test_red_where_it_got_worse(job: Job, bundle: Path, reports: dict[str, Any]) -> None:
    better = copy.deepcopy(reports["good"])
    for case in better["cases"]:
        if case["figures"]:
            case["figures"] |= {"effect_error": 0.0, "error_spread": 0.0}
    same = [case for case in reports["good"]["cases"] if case["session"] == "cpu, all"]
    baseline = job.repository / "baseline.json"
    baseline.write_text(json.dumps({**reports["good"], "cases": same}))
    assert job.run(bundle=bundle, baseline=baseline) == 0
    assert "Worse" not in job.summary.read_text()
    ideal = [case for case in better["cases"] if case["session"] == "cpu, all"]
    baseline.write_text(json.dumps({**better, "cases": ideal}))
    assert job.run(bundle=bundle, baseline=baseline) == 1
    assert "### Worse than before" in job.summary.read_text()
