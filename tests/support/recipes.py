"""The recipes of the models that ship."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tests.support.paths import MODELS


def lines_of_recipe(
    recipe: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[bytes, bytes]:
    """The lines to train on and the held-out ones that a recipe writes of a task."""
    train, held_out = folder / "train", folder / "eval"
    monkeypatch.syspath_prepend(str(MODELS / "recipes"))
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", str(train), str(held_out)])
    importlib.import_module(recipe).main()
    file = f"{name}.jsonl"
    return (train / file).read_bytes(), (held_out / file).read_bytes()
