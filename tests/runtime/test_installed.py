"""Exactly one wheel brings ONNX Runtime, or an error says what is wrong and the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_edge.errors import MissingDependencyError
from lora_edge.runtime import installed


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages, alone on the path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    installed.wheels.cache_clear()
    yield tmp_path
    installed.wheels.cache_clear()


def _install(site: Path, name: str, version: str, file: str = "onnxruntime/__init__.py") -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{file},,\n{info.name}/RECORD,,\n")


def test_two_wheels_are_named_with_the_way_out(site: Path) -> None:
    _install(site, "onnxruntime-openvino", "1.24.1")
    _install(site, "onnxruntime-qnn", "2.7.0", "onnxruntime_qnn/__init__.py")  # a plugin
    assert installed.wheels() == {"onnxruntime-openvino": "1.24.1"}
    assert installed.conflict() == ""
    installed.require()
    _install(site, "onnxruntime", "1.24.1")
    installed.wheels.cache_clear()
    installed.require()  # of one version: the last one's files are whole
    assert "onnxruntime 1.24.1 and onnxruntime-openvino 1.24.1 are installed together" in (
        installed.conflict()
    )
    _install(site, "onnxruntime-gpu", "1.31.1")
    installed.wheels.cache_clear()
    with pytest.raises(MissingDependencyError, match="write over each other") as error:
        installed.require()
    assert error.value.hint == (
        "Keep one: pip uninstall -y onnxruntime onnxruntime-gpu onnxruntime-openvino; "
        "pip install onnxruntime-gpu"
    )


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "error: running a bundle needs ONNX Runtime, which is not installed"),
        ("", "error: ONNX Runtime is installed and cannot be imported: most of its files"),
        ("raise ImportError('libcudart')", "cannot be imported: libcudart"),
        ("import no_such_module", "cannot be imported: No module named 'no_such_module'"),
    ],
)
def test_no_whole_onnxruntime_is_one_line(tmp_path: Path, module: str | None, words: str) -> None:
    if module is not None:
        (tmp_path / "onnxruntime").mkdir()
        (tmp_path / "onnxruntime" / "__init__.py").write_text(module)
    script = f"""
import sys
if {module is None!r}:
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name == "onnxruntime":
                raise ModuleNotFoundError("No module named 'onnxruntime'", name=name)
    sys.meta_path.insert(0, Hidden())
    import pathlib
    whole = pathlib.Path.is_file
    pathlib.Path.is_file = lambda path: path.name != "RECORD" and whole(path)
from lora_edge.cli import main
main(["run", "bundle", "-p", "a"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    error, hint = done.stderr.strip().splitlines()
    assert words in error
    assert "pip install" in hint
    assert done.returncode == 2
