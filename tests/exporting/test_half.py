"""Bases in float16: every kind of adapter on every form, proved in float32 and measured beside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lora_edge
from lora_edge.parity.drift import HALF_LIMITS
from tests.support.exactness import exact_case
from tests.support.kinds import Made, make_kinds

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
IDS = np.random.default_rng(5).integers(0, 256, (2, 12))
KINDS = {
    "llama": (
        "plain", "dora", "lora-bias", "saved-linear", "embedding", "alora", "embedding-and-head",
        "tokens", "saved-head", "saved-norms",
    ),
    "qwen2": ("bias-and-dora", "tokens-untied"),
    "gpt2": ("conv1d-dora", "layernorm", "positions"),
    "gemma3": ("offset-norm", "scaled-embedding"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    @functools.cache
    def make(key: str, form: Any = "fused") -> Made:
        root = tmp_path_factory.mktemp(key)
        base, adapters = make_kinds(key, root, KINDS[key])
        output = root / "bundle"
        lora_edge.export(base, adapters, output=output, precision="fp16", form=form)
        return Made(base, adapters, output)

    return make


def _types(graph: Path) -> dict[str, int]:
    """dtype of every input, output and constant of a graph."""
    model = onnx.load(str(graph), load_external_data=False)
    values = (*model.graph.input, *model.graph.output)
    return {
        **{value.name: value.type.tensor_type.elem_type for value in values},
        **{tensor.name: tensor.data_type for tensor in model.graph.initializer},
    }


@pytest.mark.parametrize(
    ("key", "form"),
    [*((key, "fused") for key in KINDS), ("llama", "portable"), ("gpt2", "portable")],
)
def test_every_kind_is_exact_in_float32_and_near_in_float16(
    key: str, form: str, made: Callable[..., Made]
) -> None:
    found = made(key, form)
    report = lora_edge.validate(found.bundle)
    assert report.passed, report.table()
    for name in KINDS[key]:
        exact_case(report, name, 0.1)
    assert {case.adapters for case in report.drift} == {(), *((name,) for name in KINDS[key])}
    for case in report.drift:
        assert case.drift is not None
        assert case.drift.logit_error > 0
        assert case.drift.kl < case.drift.kl_limit == HALF_LIMITS.kl
        assert 1e-5 < case.drift.effect_error < 0.02
    assert "float16 against float32" in report.table()
