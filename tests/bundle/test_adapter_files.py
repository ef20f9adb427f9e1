"""What is written of an adapter for the runtime."""

from __future__ import annotations

import numpy as np
import pytest

from lora_edge.bundle.adapter_files import finite_tensors
from lora_edge.errors import AdapterError


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_written(bad: float) -> None:
    tensors = {"lora.a.A": np.ones((2, 1), np.float32), "lora.a.G": np.ones(2, np.float32)}
    assert finite_tensors("x", tensors) is tensors
    tensors["lora.a.G"][1] = bad
    with pytest.raises(AdapterError, match=r"adapter x is refused: lora\.a\.G") as caught:
        finite_tensors("x", tensors)
    assert caught.value.hint
