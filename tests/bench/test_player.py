"""What every contestant tells of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_edge.bench.players.player import Adapters, Player, Rows


class _Player(Player):
    package = "numpy"

    def imports(self) -> None: ...

    def open(self) -> None: ...

    def start(self, key: str, rows: Rows, adapters: Adapters, room: int) -> None: ...

    def step(self, key: str, tokens: Sequence[int]) -> None: ...

    def give(self, logits: NDArray[np.float32]) -> None:
        self._logits["a"] = logits


def test_the_first_token_is_the_likeliest() -> None:
    player = _Player({"threads": 1})
    player.give(np.array([0.0, 1000.0, 1000.0 - math.log(3)], np.float32))
    token, probability = player.first("a")
    assert token == 1
    assert probability == pytest.approx(math.log(0.75), abs=1e-4)


def test_a_player_tells_what_it_runs() -> None:
    assert _Player({"threads": 1}).about() == f"numpy {np.__version__}"
