"""What the capture refuses, by name, with the field, the reason and the way out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_edge.base.checkpoint import resolve_base
from lora_edge.base.families import refuse_unloadable, refuse_untraceable
from lora_edge.capture import capture
from lora_edge.capture.attention import AttentionSwap, Survey
from lora_edge.capture.refusing import max_length
from lora_edge.errors import BaseModelError, CaptureError, UnsupportedModelError
from tests.support.families import make_base

_NESTED = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": None}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"alibi": True}, ["alibi", "ALiBi"]),
        ({"model_type": "mpt"}, ["mpt", "ALiBi"]),
        ({"model_type": "bamba"}, ["bamba", "recurrent state"]),
        ({"rope_scaling": {"type": "longrope"}}, ["rope_type", "longrope", "length"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["rope_type", "dynamic"]),
        ({"rope_parameters": _NESTED}, ["rope_type", "dynamic"]),
        ({"rope_parameters": {"rope_type": "unheard_of"}}, ["rope_type", "unheard_of"]),
        ({"layer_types": ["full_attention", "linear_attention"]}, ["layer_types", "linear"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights", "False"]),
    ],
)
def test_untraceable_config_is_refused(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        refuse_untraceable({"model_type": "some", **config})
    assert all(word in str(caught.value) for word in words)
    assert "optimum" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        ({"vision_config": {"hidden_size": 8}}, ["vision_config", "text models"]),
    ],
)
def test_unloadable_config_is_refused(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        refuse_unloadable({"model_type": "some", **config})
    assert all(word in str(caught.value) for word in ["some", *words])
    assert caught.value.hint


def test_plain_config_is_not_refused() -> None:
    config = {
        "num_local_experts": 1,
        "rope_parameters": {"rope_type": "llama3"},
        "layer_types": ["full_attention", "sliding_attention"],
        "scale_attn_weights": True,
    }
    refuse_unloadable(config)
    refuse_untraceable(config)


def test_what_a_model_raises_of_itself_is_a_refusal(tmp_path: Path) -> None:
    """X-MOD wants a language first."""
    base = make_base("xmod", tmp_path / "base", is_decoder=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"Xmod.* cannot be traced.*language") as caught:
        capture(resolve_base(base), tmp_path / "out")
    assert "optimum" in caught.value.hint


class _Layer(torch.nn.Module):
    layer_idx = 0


_HEADS = tuple(torch.zeros(1, heads, 3, 8) for heads in (4, 2, 2))


@contextmanager
def _refused(*words: str) -> Iterator[None]:
    with pytest.raises(UnsupportedModelError) as caught:
        yield
    assert all(word in str(caught.value) for word in ("some", *words))
    assert caught.value.hint


def test_unknown_attention_arguments_are_refused() -> None:
    swap = AttentionSwap("some")
    swap.begin(Survey())
    swap(_Layer(), *_HEADS, scaling=0.5, dropout=0.0, position_ids=torch.zeros(1, 3), s_aux=None)
    with _refused("s_aux"):
        swap(_Layer(), *_HEADS, scaling=0.5, s_aux=torch.zeros(4))


def test_attention_in_both_directions_is_refused() -> None:
    swap = AttentionSwap("some")
    swap.begin(Survey())
    layer = _Layer()
    layer.is_causal = False  # type: ignore[assignment]
    with _refused("both directions"):
        swap(layer, *_HEADS)


def test_value_heads_of_another_size_are_refused() -> None:
    swap = AttentionSwap("some")
    swap.begin(Survey())
    with _refused("value heads"):
        swap(_Layer(), *_HEADS[:2], torch.zeros(1, 2, 3, 4))


def test_a_layer_that_ran_twice_or_not_at_all_is_noticed() -> None:
    swap = AttentionSwap("some")
    swap.begin(Survey())
    swap(_Layer(), *_HEADS)
    swap.check_calls(1)
    with pytest.raises(CaptureError, match="some"):
        swap.check_calls(2)
    swap(_Layer(), *_HEADS)
    with pytest.raises(CaptureError, match="some"):
        swap.check_calls(1)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj\.weight") as caught:
        capture(resolve_base(base), tmp_path)
    assert caught.value.hint


def test_a_model_without_a_longest_sequence_is_refused() -> None:
    config = SimpleNamespace(model_type="some", max_position_embeddings=None)
    with _refused("max_position_embeddings"):
        max_length(config)


@pytest.mark.parametrize("value", ["many", -4])
def test_a_config_that_cannot_be_is_refused(value: object, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["hidden_size"] = value
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError) as caught:
        capture(resolve_base(base), tmp_path)
    assert caught.value.hint


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BaseModelError) as caught:
        capture(resolve_base(base), tmp_path)
    assert caught.value.hint


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["model_type"] = "unheard_of"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="unheard_of"):
        capture(resolve_base(base), tmp_path)
