"""The rules of the house: imports point one way, heavy ones stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lora_edge"
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "options": {"errors"},
    "names": set(),
    "quiet": set(),
    "lora": {"names"},
    "peft_types": set(),
    "refusals": {"peft_types"},
    "peft_directory": {"errors", "files", "names", "peft_types"},
    "peft_targets": {"errors", "files"},
    "peft_loading": {"errors", "manifest", "names", "peft_targets"},
    "experts": {"errors"},
    "quantization": {"files"},
    "manifest": {"errors", "files", "names", "quantization"},
    "bundle": {"errors", "files", "manifest", "options"},
    "base": {"errors", "files", "options"},
    "mlx": {"errors", "files", "names"},
    "adapter_source": {"errors", "files", "mlx"},
    "adapter_parts": {
        "errors",
        "experts",
        "lora",
        "names",
        "peft_directory",
        "peft_targets",
        "peft_types",
    },
    "adapter": {
        "options",
        "adapter_parts",
        "errors",
        "files",
        "manifest",
        "names",
        "peft_directory",
        "peft_loading",
        "peft_targets",
        "peft_types",
        "refusals",
    },
    "kinds": {"adapter", "manifest", "names"},
    "fit": {"adapter", "base", "errors", "experts", "manifest", "peft_loading", "peft_types"},
    "effects": {
        "adapter",
        "adapter_parts",
        "errors",
        "experts",
        "fit",
        "lora",
        "manifest",
    },
    "comparison": {
        "adapter",
        "base",
        "capture",
        "effects",
        "errors",
        "fit",
        "manifest",
        "peft_loading",
        "refusals",
        "renaming",
        "task_choice",
        "tasks",
    },
    "inspection": {
        "adapter",
        "adapter_parts",
        "adapter_source",
        "base",
        "comparison",
        "errors",
        "kinds",
        "manifest",
        "names",
        "peft_directory",
        "refusals",
    },
    "prompts": {
        "base",
        "bundle",
        "capture",
        "errors",
        "files",
        "manifest",
        "names",
        "peft_directory",
        "runtime",
    },
    "renaming": {
        "adapter",
        "adapter_parts",
        "base",
        "capture",
        "errors",
        "files",
        "names",
        "peft_directory",
        "peft_targets",
        "tasks",
    },
    "task_choice": {"adapter", "base", "capture", "errors", "refusals", "tasks"},
    "card": {"manifest", "tasks"},
    "convert": {"peft_directory", "base", "errors", "factorize", "files", "peft_types"},
    "factorize": {
        "peft_directory",
        "peft_targets",
        "base",
        "capture",
        "errors",
        "peft_types",
    },
    "tasks": {"errors", "manifest"},
    "capture": {
        "base",
        "bundle",
        "errors",
        "experts",
        "files",
        "manifest",
        "names",
        "quiet",
        "tasks",
    },
    "graph": {"errors", "lora", "names", "quantization"},
    "runtime": {"bundle", "errors", "files", "lora", "manifest", "names", "options"},
    "parity": {
        "options",
        "adapter",
        "base",
        "bundle",
        "capture",
        "effects",
        "errors",
        "files",
        "graph",
        "kinds",
        "lora",
        "manifest",
        "names",
        "packing",
        "peft_directory",
        "peft_targets",
        "quantization",
        "quiet",
        "renaming",
        "runtime",
        "tasks",
    },
    "removal": {"bundle", "errors", "files", "manifest", "names", "options", "parity"},
    "packing": {
        "adapter",
        "errors",
        "kinds",
        "lora",
        "manifest",
        "names",
        "peft_directory",
        "runtime",
    },
    "reports": {"errors", "files"},
    "pytest_plugin": {"errors", "files", "parity", "reports"},
    "training": {
        "options",
        "base",
        "bundle",
        "capture",
        "errors",
        "files",
        "inspection",
        "peft_directory",
        "peft_targets",
        "quiet",
        "refusals",
        "runtime",
        "tasks",
    },
}
TORCH = {"torch", "transformers", "peft", "accelerate", "optimum"}
TORCH_FILES = {"quiet.py", "reference.py", "task_reference.py"}
ONNX = {"onnx", "onnx_ir", "onnxscript"}


def _is_module(name: str) -> bool:
    return (ROOT / f"{name}.py").is_file() or (ROOT / name).is_dir()


def _imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(str(node.module))
            if node.module == "lora_edge":
                found |= {f"lora_edge.{x.name}" for x in node.names if _is_module(x.name)}
    return found


def _files(part: str) -> list[Path]:
    folder = ROOT / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{part}.py"]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part: str) -> None:
    own = {name for file in _files(part) for name in _imports(file) if "lora_edge." in name}
    assert {name.split(".")[1] for name in own} - {part} <= ALLOWED[part]


def test_every_part_has_a_rule() -> None:
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    top = {
        "__init__",
        "__main__",
        "__pycache__",
        "building",
        "building_seq2seq",
        "cli",
        "exporter",
        "start",
    }
    assert parts - top == set(ALLOWED)


def test_heavy_imports_stay_where_they_belong() -> None:
    for file in ROOT.rglob("*.py"):
        part = file.relative_to(ROOT).parts[0]
        heavy = {name.split(".")[0] for name in _imports(file)}
        if part not in {"capture", "training", "factorize.py"} and file.name not in TORCH_FILES:
            assert not heavy & TORCH, file
        if part not in {"capture", "graph"}:
            assert not heavy & ONNX, file


@pytest.mark.parametrize(
    "code",
    ["import lora_edge", "from lora_edge.cli import main; main(['--help'])"]
    + [
        f"from lora_edge.cli import main; main(['{verb}', '--help'])"
        for verb in ("train", "export", "add", "remove", "run", "validate", "golden", "inspect")
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
