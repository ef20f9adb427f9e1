"""The rules of the house: imports point one way, heavy ones stay where they belong.

And what a task or a driver decides is decided in few places.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "lora_edge"
# Bottom to top; each folder sees those that are named, and itself.
_BELOW_FIT = {"files", "maths", "tasks", "base", "adapter"}
_BELOW_BUNDLE = {*_BELOW_FIT, "fit", "targets"}
_BELOW_RUN = {*_BELOW_BUNDLE, "bundle"}
ALLOWED: dict[str, set[str]] = {
    "files": set(),
    "maths": {"files"},
    "tasks": {"maths"},
    "base": {"files", "maths", "tasks"},
    "adapter": {"files", "maths", "base"},
    "fit": _BELOW_FIT,
    "targets": set(),
    "bundle": _BELOW_BUNDLE,
    "clients": {"targets"},
    "capture": _BELOW_RUN,
    "graph": _BELOW_RUN,
    "runtime": _BELOW_RUN,
    "parity": {*_BELOW_RUN, "capture", "clients", "graph", "runtime"},
    "exporting": {*_BELOW_RUN, "capture", "graph", "runtime", "parity"},
    "bench": {*_BELOW_RUN, "clients", "runtime", "exporting"},
    "training": {*_BELOW_RUN, "capture", "graph", "runtime", "parity", "exporting"},
    "reports": {"files"},
    "kits": {*_BELOW_RUN, "clients"},
    "cli": {*_BELOW_RUN, "runtime", "parity", "exporting", "training", "bench", "reports", "kits"},
}
# At the root, for every folder: what they import in turn.
SHARED: dict[str, set[str]] = {"errors": set(), "lazy": set(), "names": set(), "types": {"errors"}}
FACE = {"__init__", "__main__", "pytest_plugin"}
TORCH = {"torch", "transformers", "peft", "accelerate", "optimum"}
TORCH_FILES = {
    "quiet.py",
    "reference.py",
    "reference_models.py",
    "peft_models.py",
    "peft_layers.py",
    "by_layer.py",
    "factorize.py",
    "pytorch.py",
}
ONNX = {"onnx", "onnx_ir", "onnxscript"}


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def _imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(str(node.module))
            if node.module == "lora_edge":
                found |= {
                    f"lora_edge.{x.name}" for x in node.names if _is_module(f"lora_edge.{x.name}")
                }
    return found


def _files(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def _dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _top_imports(file: Path) -> set[str]:
    """What is imported when the module is, with the modules that names are taken from."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.add(whole if _is_module(whole) else str(node.module))
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    own = {name for file in _files(folder) for name in _imports(file) if "lora_edge." in name}
    seen = {name.split(".")[1] for name in own} - {folder, *SHARED}
    assert seen <= ALLOWED[folder]
    for name in seen:
        assert folder not in ALLOWED[name]


def test_the_root_has_the_public_face_and_what_all_share() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert modules == {*FACE, *SHARED}
    assert folders == set(ALLOWED)
    for name, allowed in SHARED.items():
        own = {x.split(".")[1] for x in _imports(PACKAGE / f"{name}.py") if "lora_edge." in x}
        assert own <= allowed


def test_no_modules_import_each_other() -> None:
    """Not even inside a folder, where an import is at the top."""
    modules = {_dotted(file): file for file in PACKAGE.rglob("*.py")}
    after = {name: _top_imports(file) & set(modules) for name, file in modules.items()}
    while ready := [name for name, needs in after.items() if not needs & set(after)]:
        for name in ready:
            del after[name]
    assert not after, after


def test_heavy_imports_stay_where_they_belong() -> None:
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0]
        heavy = {name.split(".")[0] for name in _imports(file)}
        if part not in {"capture", "training", "base"} and file.name not in TORCH_FILES:
            assert not heavy & TORCH, file
        if part not in {"capture", "graph"}:
            assert not heavy & ONNX, file


@pytest.mark.parametrize(
    "code",
    ["import lora_edge", "from lora_edge.cli import main; main(['--help'])"]
    + [
        f"from lora_edge.cli import main; main(['{verb}', '--help'])"
        for verb in (
            "train",
            "export",
            "add",
            "remove",
            "run",
            "bench",
            "validate",
            "golden",
            "kit",
            "package",
            "inspect",
            "targets",
        )
    ],
)
def test_help_and_import_need_no_torch_and_switch_telemetry_off(code: str) -> None:
    script = (
        f"import atexit, os, sys\n"
        f"def report():\n"
        f"    heavy = {TORCH | {'onnx', 'onnxruntime'}!r} & set(sys.modules)\n"
        f"    print(sorted(heavy), os.environ['ORT_DISABLE_TELEMETRY'], file=sys.stderr)\n"
        f"atexit.register(report)\n{code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip().splitlines()[-1] == "[] 1"


def test_public_names_are_the_documented_ones() -> None:
    import lora_edge

    assert dir(lora_edge) == sorted(lora_edge.__all__)
    for name in lora_edge.__all__:
        assert getattr(lora_edge, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = lora_edge.nothing  # type: ignore[attr-defined]


_OF_A_TASK = re.compile(
    r"\.(causal|seq2seq|generates)\b(?!\.)|\bdriver (==|!=)"
    r"|\btask(\.name)? (==|!=|in|not in|is|is not) "
    r"|beginning is (not )?None|isinstance\([^)]*\b(Decoder|Encoder|Seq2Seq)\b"
    r"|\.(behind|headed|layered|remeasured)\b"
)


def test_few_places_branch_on_the_task() -> None:
    """74 at 955968e, counted by the same words; a new one needs a reason."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "tasks":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            tests: list[ast.expr] = []
            if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
                tests = [node.test]
            elif isinstance(node, ast.comprehension):
                tests = node.ifs
            found += [(file.name, x.lineno) for x in tests if _OF_A_TASK.search(ast.unparse(x))]
    assert len(found) <= 30, found
