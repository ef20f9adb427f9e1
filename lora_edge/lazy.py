"""Names of a package that are loaded when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attributes(package: str, table: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package; what it has found, the package has from then on.

    Args:
        package: its dotted name.
        table: name -> the module that has it.
    """

    def load(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(table[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
