"""Manifests of format version 1, written by the release before parts, are read as version 2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_edge.bundle.manifest import Manifest
from lora_edge.bundle.part import Beginning, Cache
from lora_edge.errors import BundleError

V1 = Path(__file__).with_name("v1")


def _old(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((V1 / f"{name}.json").read_text(encoding="utf-8"))
    return data


def _lifted(name: str) -> Manifest:
    return Manifest.from_json(json.dumps(_old(name)))


@pytest.mark.parametrize("name", ["decoder", "encoder", "text2text", "speech"])
def test_nothing_is_lost_on_the_way(name: str) -> None:
    old, manifest = _old(name), _lifted(name)
    assert old["format_version"] == 1
    assert set(manifest.sites) == set(old["sites"])
    new = json.loads(manifest.to_json())
    assert new["format_version"] == 2
    sites = {path: site for part in new["parts"].values() for path, site in part["sites"].items()}
    assert sites == old["sites"]
    for entry in new["adapters"].values():
        assert entry.pop("half") == ""  # which they did not have
    kept = set(old) - {"graph", "sites", "format_version"}
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_decoder() -> None:
    (part,) = _lifted("decoder").parts.values()
    assert (part.file, part.form, part.padding, part.head) == (
        "onnx/model.onnx", "fused", "right", "lm_head"
    )  # fmt: skip
    assert part.cache == Cache("shared", layers=3, kv_heads=2, head_dim=32)
    assert (part.vocab_size, part.max_length, part.output) == (264, 512, "logits")


def test_a_model_without_a_cache() -> None:
    (part,) = _lifted("encoder").parts.values()
    assert part.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert (part.file, part.cache, part.sample) == ("onnx/model.onnx", None, ())


def test_an_encoder_decoder_of_text() -> None:
    manifest = _lifted("text2text")
    encoder, decoder = (manifest.parts[name] for name in ("encoder", "decoder"))
    assert (manifest.reads, manifest.gives) == (encoder, decoder)
    assert (encoder.file, decoder.file) == ("onnx/encoder_model.onnx", "onnx/decoder_model.onnx")
    assert encoder.sites
    assert all(path.startswith("encoder.") for path in encoder.sites)
    assert decoder.sites
    assert not any(path.startswith("encoder.") for path in decoder.sites)
    assert encoder.vocab_size == decoder.vocab_size > 0
    assert manifest.beginning == Beginning(tuple(_old("text2text")["graph"]["start"]))


def test_an_encoder_decoder_of_speech() -> None:
    manifest = _lifted("speech")
    encoder, decoder = (manifest.parts[name] for name in ("encoder", "decoder"))
    assert (encoder.inputs, encoder.sample, encoder.vocab_size) == (
        ("input_features",), (16, 40), 0
    )  # fmt: skip
    graph = _old("speech")["graph"]
    assert (decoder.vocab_size, decoder.max_length) == (graph["vocab_size"], graph["max_target"])
    assert manifest.beginning is not None
    assert list(manifest.beginning.suppress) == graph["suppress"]
    assert list(manifest.beginning.begin_suppress) == graph["begin_suppress"]


@pytest.mark.parametrize("name", ["graph", "sites", "task"])
@pytest.mark.parametrize("value", [None, [], "x", 3, {}])
def test_what_is_no_manifest_is_refused_as_ever(name: str, value: object) -> None:
    if name == "sites" and value == {}:
        return  # a merged bundle
    with pytest.raises(BundleError):
        Manifest.from_json(json.dumps({**_old("decoder"), name: value}))
    without = _old("text2text")
    del without[name]
    with pytest.raises(BundleError):
        Manifest.from_json(json.dumps(without))


@pytest.mark.parametrize("name", ["decoder", "encoder", "text2text"])
def test_a_field_that_version_1_did_not_have_is_refused(name: str) -> None:
    old = _old(name)
    old["graph"]["colour"] = 1
    with pytest.raises(BundleError, match="colour is no field"):
        Manifest.from_json(json.dumps(old))


def test_it_is_what_this_release_writes_but_for_the_inputs() -> None:
    """A part of version 2 names all inputs; version 1 left those to be found in the graph."""
    manifest = _lifted("decoder")
    part = replace(manifest.reads, inputs=(*manifest.reads.inputs, "logits_positions"))
    whole = replace(manifest, parts={"decoder": part})
    assert Manifest.from_json(whole.to_json()) == whole
