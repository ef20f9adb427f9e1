"""What other clients read: ``config.json`` for transformers.js, ``genai_config.json``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_edge.bundle.clients import client_config, genai_config
from lora_edge.bundle.manifest import AdapterEntry, Manifest

V1 = Path(__file__).with_name("v1")
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6}


def _manifest(name: str, **changes: Any) -> Manifest:
    text = (V1 / f"{name}.json").read_text(encoding="utf-8")
    return replace(Manifest.from_json(text), **changes)


def _part(manifest: Manifest, **changes: Any) -> Manifest:
    return replace(manifest, parts={"decoder": replace(manifest.reads, **changes)})


CONFIG = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": None}


def test_genai_reads_the_sizes_of_the_graph() -> None:
    manifest = _manifest("decoder")
    cache = manifest.reads.cache
    assert cache is not None
    found = genai_config(manifest, CONFIG, GENERATION)
    assert found is not None
    model, decoder = found["model"], found["model"]["decoder"]
    assert model["type"] == "llama"
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2, 7], 2)
    assert model["vocab_size"] == manifest.reads.vocab_size
    assert decoder["filename"] == manifest.reads.file
    assert decoder["num_hidden_layers"] == cache.layers
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (
        cache.kv_heads,
        cache.head_dim,
    )
    assert set(manifest.reads.inputs) <= set(decoder["inputs"])
    assert found["search"]["past_present_share_buffer"] == (cache.kind == "shared")
    assert found["search"]["do_sample"] is True
    assert found["search"]["temperature"] == 0.6
    json.dumps(found)


def test_an_input_that_genai_fills_is_not_named() -> None:
    """0.18 refuses a config that names it."""
    manifest = _manifest("decoder")
    inputs = (*manifest.reads.inputs, "num_logits_to_keep")
    found = genai_config(_part(manifest, inputs=inputs), CONFIG, {})
    assert found is not None
    assert set(manifest.reads.inputs) <= set(found["model"]["decoder"]["inputs"])
    assert "num_logits_to_keep" not in found["model"]["decoder"]["inputs"]


def test_what_genai_does_not_say_is_left_out() -> None:
    config = {"model_type": "olmo2", "num_attention_heads": 4}
    found = genai_config(_manifest("decoder"), config, {})
    assert found is not None
    model = found["model"]
    assert model["type"] == "llama"  # 0.18 knows no olmo2, and the loop is the same
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & set(model)
    assert found["search"]["do_sample"] is False


@pytest.mark.parametrize(
    ("length", "context", "most"), [(0, 1 << 17, 4096), (512, 512, 512), (8192, 8192, 4096)]
)
def test_genai_takes_memory_for_no_more_than_a_model_has(
    length: int, context: int, most: int
) -> None:
    found = genai_config(_part(_manifest("decoder"), max_length=length), CONFIG, {})
    assert found is not None
    assert (found["model"]["context_length"], found["search"]["max_length"]) == (context, most)


@pytest.mark.parametrize("name", ["encoder", "text2text", "speech"])
def test_genai_has_no_loop_for_other_tasks(name: str) -> None:
    assert genai_config(_manifest(name), CONFIG, {}) is None


def test_transformers_js_finds_the_graph_and_its_data() -> None:
    found = client_config(CONFIG, _manifest("decoder"), "LlamaForCausalLM")
    told = found.pop("transformers.js_config")
    assert told == {"dtype": "fp32", "use_external_data_format": {"model.onnx": True}}
    assert found == CONFIG


@pytest.mark.parametrize("mode", ["switchable", "merged"])
def test_a_merged_classifier_names_its_labels(mode: Any) -> None:
    entry = AdapterEntry("a", "", "LoRA", {}, "", "", proved=True, labels=("no", "yes"))
    manifest = _manifest("encoder", mode=mode, adapters={"a": entry}, task="text-classification")
    found = client_config({"model_type": "bert"}, manifest, "BertForSequenceClassification")
    assert found["architectures"] == ["BertForSequenceClassification"]
    labels = {"0": "no", "1": "yes"} if mode == "merged" else None
    assert found.get("id2label") == labels
