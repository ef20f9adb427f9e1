"""What follows from the kind of data, without a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lora_edge.training.encoders import RowEncoder
from lora_edge.training.loop import Batches


class _Some(RowEncoder):
    def __init__(self, pad: int) -> None:
        self.batches = Batches(pad)

    def __call__(self, rows: Any, drop: Any) -> Any:  # noqa: ARG002
        return ()


@pytest.mark.parametrize(("own", "settled"), [(None, 7), (3, 3)])
def test_a_classifier_is_told_what_fills_up_rows(own: int | None, settled: int) -> None:
    model = SimpleNamespace(config=SimpleNamespace(pad_token_id=own))
    _Some(7).settle(model)
    assert model.config.pad_token_id == settled


def test_a_config_without_the_field_is_left_alone() -> None:
    model = SimpleNamespace(config=SimpleNamespace())
    _Some(7).settle(model)
    assert not vars(model.config)
