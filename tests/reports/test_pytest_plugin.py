"""The pytest plugin in a suite of somebody else's, run by pytest itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from junitparser import JUnitXml

from tests.support import shipped

OPTIONS = ("-p", "no:cacheprovider", "-q", "-rfE")  # the plugin comes with the package
SUITE = """
import pytest

def test_parity(lora_edge_case):
    lora_edge_case.check()
"""


def _pytest(directory: Path, *arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *map(str, arguments)],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (tmp_path / "test_bundle.py").write_text(SUITE)
    return tmp_path


def test_a_test_for_each_case(suite: Path, bundle: Path) -> None:
    page, xml = suite / "page.html", suite / "junit.xml"
    code, out = _pytest(
        suite, "--lora-edge-bundle", bundle, "--lora-edge-html", page, "--junit-xml", xml
    )
    assert code == 0, out
    names = {test.name for one in JUnitXml.fromfile(str(xml)) for test in one}
    assert "test_parity[adapter echo]" in names
    assert "test_parity[mixed row 0: echo]" in names
    assert "✓ passed" in page.read_text(encoding="utf-8")


def test_a_fault_fails_the_tests_of_its_adapter(suite: Path, bundle: Path, faulty: Path) -> None:
    code, out = _pytest(suite, "--lora-edge-bundle", bundle, "--lora-edge-bundle", faulty)
    assert code == 1
    failed = {line.split(" - ")[0] for line in out.splitlines() if line.startswith("FAILED")}
    assert "FAILED test_bundle.py::test_parity[faulty: adapter mirror]" in failed
    assert not any("good: " in line or "adapter echo]" in line for line in failed)
    assert "times PyTorch's effect" in out
    assert "again: lora-edge validate" in out


def test_the_mark_names_bundle_reference_and_options(suite: Path, bundle: Path) -> None:
    (suite / "test_bundle.py").write_text(
        f"""
import pytest

@pytest.mark.lora_parity({str(bundle)!r}, reference={str(shipped.BASE)!r}, depth="quick", steps=1,
                         optimization=["basic"])
def test_parity(lora_edge_case):
    assert lora_edge_case.report["against"] == "reference"
    assert lora_edge_case.report["settings"]["steps"] == 1
    assert lora_edge_case.report["sessions"][0]["optimization"] == "basic"
    lora_edge_case.check()
"""
    )
    code, out = _pytest(suite)
    assert code == 0, out


@pytest.mark.long
def test_in_several_processes(suite: Path, faulty: Path) -> None:
    page = suite / "new" / "page.html"
    code, out = _pytest(suite, "-n", "2", "--lora-edge-bundle", faulty, "--lora-edge-html", page)
    assert code == 1, out
    assert "test_parity[adapter echo]" not in out
    assert "FAILED test_bundle.py::test_parity[adapter mirror]" in out
    failed = re.findall(r"^FAILED test_bundle.py::test_parity\[(.*?)\]", out, re.MULTILINE)
    assert all("mirror" in case for case in failed)
    assert re.search(rf"{len(failed)} failed, \d{{2}} passed", out)
    assert "✗ not passed" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "no bundle is named"), (["--lora-edge-bundle", "nowhere"], "nowhere is not a bundle")],
)
def test_what_cannot_be_run_says_so(suite: Path, arguments: list[str], words: str) -> None:
    code, out = _pytest(suite, *arguments)
    assert code not in {0, 1, 5}
    assert words in out


def test_suites_that_do_not_use_it_pay_nothing(suite: Path) -> None:
    (suite / "test_bundle.py").write_text(
        """
import sys

def test_own():
    heavy = {"numpy", "onnxruntime", "torch", "jinja2", "lora_edge.parity"}
    assert not heavy & set(sys.modules)
"""
    )
    code, out = _pytest(suite)
    assert code == 0, out
