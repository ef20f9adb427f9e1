"""Every error that lora-edge raises says what to do next."""

from __future__ import annotations

import ast

from lora_edge import errors
from tests.support.paths import ROOT

ROOT = ROOT / "lora_edge"
NAMES = {name for name in vars(errors) if name.endswith("Error")}


def _without_hint(source: str) -> list[int]:
    """Lines on which one of the errors is made without a hint, or with an empty one."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
            hints = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "hint")]
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            empty = any(isinstance(hint, ast.Constant) and not hint.value for hint in hints)
            if empty or not (hints or starred):
                lines.append(node.lineno)
    return lines


def test_every_error_has_a_hint() -> None:
    found = {
        f"{file.relative_to(ROOT)}:{line}"
        for file in ROOT.rglob("*.py")
        for line in _without_hint(file.read_text(encoding="utf-8"))
    }
    assert not found


def test_a_missing_hint_would_be_found() -> None:
    source = 'raise DataError("no")\nraise DataError("no", "")\nraise DataError("no", "Do so.")\n'
    assert _without_hint(source) == [1, 2]


def test_only_parity_has_the_exit_code_1() -> None:
    kinds = [getattr(errors, name) for name in NAMES]
    assert {kind.__name__ for kind in kinds if kind.exit_code == 1} == {"ParityError"}
    assert all(issubclass(kind, errors.LoraEdgeError) for kind in kinds)
