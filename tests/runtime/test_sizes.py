"""Sizes that a manifest claims are held to the graph before anything is made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_edge.bundle.manifest import Manifest
from lora_edge.errors import BundleError, DataError
from lora_edge.runtime import Decoder, Runner


def _with_part(manifest: Manifest, **changes: Any) -> Manifest:
    parts = {"decoder": replace(manifest.parts["decoder"], **changes)}
    return replace(manifest, parts=parts)


@pytest.mark.parametrize("form", ["fused", "portable"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 1}, r"past_key_values\.1\.key, which a decoder of 1 layers"),
        ({"layers": 4000}, "lacks"),
        ({"kv_heads": 999}, r"past_key_values\.0\.key is .*, but the manifest says \[any, 999, "),
        ({"head_dim": 65536}, r"past_key_values\.0\.key is .*65536"),
        ({"vocab_size": 1 << 24}, "logits is .*16777216"),
    ],
)
def test_a_decoder_of_other_sizes_is_refused(
    bundles: dict[str, Any], form: str, changes: dict[str, int], words: str
) -> None:
    bundle = bundles[form]
    part = bundle.manifest.parts["decoder"]
    sizes = {name: value for name, value in changes.items() if name != "vocab_size"}
    others = {name: value for name, value in changes.items() if name == "vocab_size"}
    manifest = _with_part(bundle.manifest, cache=replace(part.cache, **sizes), **others)
    with pytest.raises(BundleError, match=words):
        Runner(replace(bundle, manifest=manifest))


def test_a_site_of_another_size_is_refused(bundles: dict[str, Any]) -> None:
    bundle = bundles["fused"]
    path, site = next(iter(bundle.manifest.sites.items()))
    for changes in ({"in_features": 1 << 31}, {"out_features": 1 << 31}):
        sites = {**bundle.manifest.sites, path: replace(site, **changes)}
        with pytest.raises(BundleError, match=f"{path}.* is .*, but the manifest says"):
            Runner(replace(bundle, manifest=_with_part(bundle.manifest, sites=sites)))


def test_a_cache_that_no_memory_holds_is_refused(bundles: dict[str, Any]) -> None:

    bundle = bundles["fused"]
    parts = _with_part(bundle.manifest, max_length=1 << 31).parts
    decoder = Decoder(bundle.directory, parts, threads=1)
    with pytest.raises(DataError, match="does not fit in the memory"):
        decoder.start(1 << 20, 1 << 31)


def test_a_name_that_is_no_text_is_refused(tiny: Any, tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path / "bundle", "fused")
    file = bundle.directory / "onnx" / "model.onnx"
    for name in (b"past_key_values.0.key", b"total"):
        content = file.read_bytes()
        at = content.rindex(name) if name in content else -1
        file.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        with pytest.raises(BundleError):
            Runner(tiny.rehash(bundle, "onnx/model.onnx"))
        file.write_bytes(content)
