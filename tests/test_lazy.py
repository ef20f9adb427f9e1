from __future__ import annotations

import sys
from types import ModuleType

import pytest

from lora_edge.lazy import attributes


def test_a_name_is_loaded_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("some_package")
    monkeypatch.setitem(sys.modules, "some_package", package)
    load = attributes("some_package", {"sqrt": "math"})
    package.__dict__["__getattr__"] = load
    assert "sqrt" not in vars(package)
    assert package.sqrt(4.0) == 2.0
    assert "sqrt" in vars(package)


def test_other_names_are_refused_by_name() -> None:
    with pytest.raises(AttributeError, match=r"module 'some_package' has no attribute 'other'"):
        attributes("some_package", {"sqrt": "math"})("other")
