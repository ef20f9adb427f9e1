"""What the Runner does on its own, watched."""

from __future__ import annotations

from typing import Any

import pytest

from lora_edge.runtime import routes


def watched_routes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compared with the switchable graph from now on, by name, as it is."""
    compared: list[str] = []
    plain = routes.check_agrees

    def check(*arguments: Any) -> None:
        compared.append(arguments[-1])
        plain(*arguments)

    monkeypatch.setattr(routes, "check_agrees", check)
    return compared
