"""The naming contract: what is made is parsed, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_edge.names import (
    FACTOR_PARTS,
    SELECT,
    STACKED_PARTS,
    lora_input,
    parse_lora_input,
    parse_peft_key,
    past_name,
    present_name,
)

PATHS = st.from_regex(r"[a-z_]{1,8}(\.([a-z_]{1,8}|[0-9]{1,3}|lora|A|B|gate)){0,5}", fullmatch=True)


@given(path=PATHS, part=st.sampled_from((*FACTOR_PARTS, *STACKED_PARTS, "W", "c")))
def test_an_input_name_is_parsed_as_it_was_made(path: str, part: str) -> None:
    name = lora_input(path, part)  # type: ignore[arg-type]
    assert parse_lora_input(name) == (path, part)


@given(path=PATHS, part=st.sampled_from(["A", "B"]))
def test_a_peft_key_is_parsed_with_or_without_its_prefix(path: str, part: str) -> None:
    for prefix in ("base_model.model.", ""):
        assert parse_peft_key(f"{prefix}{path}.lora_{part}.weight") == (path, part)


@pytest.mark.parametrize(
    ("tail", "part"),
    [
        ("lora_B.bias", "B.bias"),
        ("lora_magnitude_vector", "magnitude"),
        ("lora_magnitude_vector.weight", "magnitude"),
        ("lora_embedding_A", "embedding_A"),
        ("lora_embedding_B", "embedding_B"),
        ("token_adapter.trainable_tokens_delta", "tokens"),
        ("base_layer.weight", "base"),
    ],
)
def test_what_else_an_adapter_holds(tail: str, part: str) -> None:
    assert parse_peft_key(f"base_model.model.a.q.{tail}") == ("a.q", part)


@pytest.mark.parametrize(
    "tail", ["lora_velora_embed", "lora_monteclora_sampler.std_prior", "lora_monteclora_sampler.x"]
)
def test_what_only_training_reads(tail: str) -> None:
    assert parse_peft_key(f"base_model.model.a.q.{tail}") == (f"a.q.{tail}", "training")
    assert parse_peft_key(f"base_model.model.a.q.{tail}.other.one") is None
    assert parse_peft_key("base_model.model.a.q.lora_diag") is None


def test_saved_parameters_have_parameter_paths() -> None:
    assert parse_peft_key("base_model.model.a.norm.weight") == ("a.norm.weight", "saved")
    assert parse_peft_key("base_model.model.a.q.base_layer.bias") == ("a.q.bias", "saved")
    assert parse_peft_key("base_model.model.a.q.modules_to_save.bias") == ("a.q.bias", "saved")
    assert parse_peft_key("base_model.model.a.q.original_module.bias") == ("a.q.bias", "idle")


@pytest.mark.parametrize(
    "name",
    [
        SELECT,
        "input_ids", "past_key_values.0.key", "lora.A", "lora.q.C", "lora.q.A.rank", "q.A",
        "lora.q.gate ", "Lora.q.A",
    ],
)  # fmt: skip
def test_other_inputs_are_no_adapter_inputs(name: str) -> None:
    assert parse_lora_input(name) is None


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.q.lora_A",
        "base_model.model.q.lora_A.default.weight.old",
        "base_model.model.q.lora_C.weight",
        "lora_A.weight",
        "weight",
    ],
)
def test_other_tensors_are_no_factors(key: str) -> None:
    assert parse_peft_key(key) is None


def test_names_of_the_graph() -> None:
    """The names that other runtimes expect, and that old bundles have."""
    path = "model.layers.0.self_attn.q_proj"
    assert [lora_input(path, part) for part in FACTOR_PARTS] == [
        f"lora.{path}.A",
        f"lora.{path}.B",
        f"lora.{path}.gate",
    ]
    assert past_name(3, "key") == "past_key_values.3.key"
    assert present_name(11, "value") == "present.11.value"


@pytest.mark.parametrize("name", ["none", "base"])
def test_what_names_no_adapter_at_all_names_no_adapter(name: str) -> None:
    from lora_edge.adapter.load import check_name
    from lora_edge.errors import AdapterError

    with pytest.raises(AdapterError, match="reserved"):
        check_name(name)
    assert check_name(f"{name}-2") == f"{name}-2"
