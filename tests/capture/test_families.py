"""Every supported family in both forms against eager PyTorch; every refused one by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from lora_edge.base.checkpoint import resolve_base
from lora_edge.errors import CaptureError, UnsupportedModelError
from tests.support.captures import captured
from tests.support.checks import checked
from tests.support.examples import examples
from tests.support.families import OTHER_ROTARIES, REFUSED, SUPPORTED, make_base


@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
@pytest.mark.parametrize("family", [*SUPPORTED, *OTHER_ROTARIES])
def test_family_equals_pytorch(family: str, form: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path / "base")
    graph = captured(base, form, tmp_path / form)
    figures = checked(graph, resolve_base(base))
    worst = max(case["logit_error"] for case in figures["cases"].values())
    assert worst <= 1e-5
    assert figures["window_covered"]


def test_portable_form_has_standard_operators_only(tmp_path: Path) -> None:
    graph = captured(make_base("qwen3", tmp_path / "base"), "portable", tmp_path / "out")
    model = onnx.load(graph.path(), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}


def test_a_wrong_capture_is_refused(tmp_path: Path) -> None:
    """The control: the same model without its window must fail the base check."""
    base = make_base("mistral", tmp_path / "base")
    other = make_base("mistral", tmp_path / "other", sliding_window=None)
    graph = captured(other, "fused", tmp_path / "out")
    with pytest.raises(CaptureError):
        checked(graph, resolve_base(base))


def test_tied_embedding_is_one_tensor_and_the_cache_has_static_heads(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", tie_word_embeddings=True)
    graph = captured(base, "fused", tmp_path / "out")
    model = onnx.load(graph.path(), load_external_data=False)
    names = {tensor.name for tensor in model.graph.initializer}
    assert graph.tied
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    past = next(v for v in model.graph.input if v.name == "past_key_values.0.key")
    dims = past.type.tensor_type.shape.dim
    assert (dims[1].dim_value, dims[3].dim_value) == (2, 32)


def test_nothing_global_is_left_behind(tmp_path: Path) -> None:
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    view = torch.Tensor.view
    before = set(ALL_ATTENTION_FUNCTIONS.keys())
    captured(make_base("llama", tmp_path / "base"), "fused", tmp_path / "out")
    assert torch.Tensor.view is view
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == before


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_families_are_refused_by_name(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    changes, field = REFUSED[family]
    base = make_base(family, tmp_path / "base", **changes)
    with pytest.raises(UnsupportedModelError, match=field) as caught:
        captured(base, "fused", tmp_path / "out")
    assert family in str(caught.value)
    assert caught.value.hint
    record_property("family", family)
    record_property("refusal", str(caught.value))
