"""Opening a bundle: its manifest's schema, and links that lead out of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_edge.bundle.bundle import MANIFEST_NAME, load_bundle
from lora_edge.bundle.manifest import Manifest
from lora_edge.errors import BundleError

CACHE = {"kind": "shared", "layers": 2, "kv_heads": 2, "head_dim": 8}
SITE = {"in_features": 4, "out_features": 6}
ADAPTER = {
    "name": "a",
    "file": "adapters/a/adapter.onnx_adapter",
    "kind": "LoRA",
    "ranks": {"x": 2},
    "digest": "d",
    "base_fingerprint": "f",
    "proved": True,
}
PART: dict[str, Any] = {
    "file": "onnx/model.onnx",
    "form": "fused",
    "backend": "trace",
    "inputs": ["input_ids", "attention_mask"],
    "output": "logits",
    "vocab_size": 64,
    "max_length": 128,
    "padding": "right",
    "head": "lm_head",
    "cache": CACHE,
    "sites": {"x": SITE},
}
WHOLE: dict[str, Any] = {
    "format_version": 2,
    "mode": "switchable",
    "task": "text-generation",
    "precision": "fp32",
    "parts": {"decoder": PART},
    "base": {"name_or_path": "b", "model_type": "llama", "fingerprint": "f"},
    "kinds": ["lora"],
    "adapters": {"a": ADAPTER},
    "base_check": {},
    "versions": {"lora-edge": "0.1"},
    "files": {"adapters/a/adapter.onnx_adapter": {"sha256": "0" * 64, "bytes": 1}},
}


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *above, last = path.split("/")
        for part in above:
            data = data[part]
        data[last] = value

    return change


def test_a_whole_manifest_is_read() -> None:
    manifest = Manifest.from_json(json.dumps(WHOLE))
    assert manifest.reads is manifest.gives is manifest.parts["decoder"]
    assert manifest.sites == manifest.reads.sites
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(b"\xef\xbb\xbf" + manifest.to_json().encode()) == manifest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("mode", "both"), "mode is 'both', expected 'switchable' or 'merged'"),
        (_set("mode", []), "mode is"),
        (_set("task", "poetry"), "task is 'poetry', expected one of"),
        (_set("task", {}), "task is"),
        (_set("task", "text-classification"), "has the parts encoder, got decoder"),
        (_set("precision", "fp8"), "precision is 'fp8'"),
        (
            _set("parts/decoder/cache/layers", 10**7),
            "parts.decoder.cache.layers is 10000000, expected 1 to",
        ),
        (_set("parts/decoder/cache/layers", "2"), "parts.decoder.cache.layers is '2'"),
        (_set("parts/decoder/max_length", 2**40), "parts.decoder.max_length is"),
        (_set("parts/decoder/cache/kv_heads", -1), "parts.decoder.cache.kv_heads is -1"),
        (_set("parts/decoder/vocab_size", 10**12), "parts.decoder.vocab_size is"),
        (_set("parts/decoder/cache/head_dim", True), "parts.decoder.cache.head_dim is True"),
        (_set("parts/decoder/cache/kind", "none"), "parts.decoder.cache.kind is 'none'"),
        (_set("parts/decoder/cache", None), "parts.decoder.cache is not of text-generation"),
        (_set("parts/decoder/inputs", []), "parts.decoder.inputs is empty"),
        (_set("parts/decoder/file", "../x.onnx"), "parts.decoder.file is '../x.onnx'"),
        (_set("parts", {"encoder": PART}), "has the parts decoder, got encoder"),
        (_set("parts", {}), "has the parts decoder, got none"),
        (_set("beginning", {"start": [1]}), "has the parts decoder"),
        (_set("task", "text2text-generation"), "has the parts encoder and decoder and a beginning"),
        (_set("parts/decoder/form", None), "parts.decoder.form is None"),
        (_set("parts", []), r"parts is \[\]"),
        (_set("base", {}), "base.fingerprint is missing"),
        (_set("base", {"fingerprint": "f", "model_type": "m"}), "base.name_or_path is missing"),
        (_set("base/fingerprint", 3), "base.fingerprint is 3"),
        (_set("kinds", "lora"), "kinds is 'lora'"),
        (_set("parts/decoder/sites", [SITE]), "parts.decoder.sites is"),
        (_set("parts/decoder/sites/x/in_features", -4), "parts.decoder.sites.x.in_features is -4"),
        (_set("parts/decoder/sites/x/kind", "lstm"), "parts.decoder.sites.x.kind is 'lstm'"),
        (
            _set("parts/decoder/sites/x/parts", ["A", "Z"]),
            r"parts.decoder.sites.x.parts\[1\] is 'Z'",
        ),
        (_set("parts/decoder/sites/x/weight", {"name": "w"}), "parts.decoder.sites.x.weight"),
        (_set("adapters/a", None), "adapters.a is None"),
        (_set("adapters/a/ranks", {"x": -1}), "adapters.a.ranks.x is -1"),
        (_set("adapters/a/name", "b"), "is called 'b'"),
        (_set("adapters/a/file", "/etc/passwd"), "adapters.a.file is '/etc/passwd'"),
        (_set("adapters/a/file", "../../x"), "adapters.a.file is '../../x'"),
        (_set("adapters/a/file", "adapters/b"), "which is none of the bundle's"),
        (_set("adapters/a/invocation", "NaN"), "adapters.a.invocation is 'NaN'"),
        (_set("adapters/a/colour", 1), "adapters.a.colour is no field"),
        (_set("files", {"../x": {"sha256": "0" * 64, "bytes": 1}}), "a key of files is '../x'"),
        (_set("files", {"x": {"sha256": "0", "bytes": 1}}), "files.x.sha256 is '0'"),
        (_set("files", {"x": {"sha256": "0" * 64, "bytes": -1}}), "files.x.bytes is -1"),
        (_set("quantization", {"bits": 3, "block_size": 32, "layers": []}), "bits is 3"),
        (_set("format_version", 3), "format_version 3, expected 2"),
        (_set("format_version", True), "format_version True, expected 2"),
        (_set("format_version", None), "format_version None, expected 2"),
        (_set("surprise", 1), "surprise is no field"),
        (lambda data: data.pop("versions"), "versions is missing"),
    ],
)
def test_a_value_outside_its_schema_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], words: str
) -> None:
    data = json.loads(json.dumps(WHOLE))
    change(data)
    with pytest.raises(BundleError, match=words):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, '{"mode": 1, "mode": 2}'])
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(BundleError, match=MANIFEST_NAME):
        load_bundle(tmp_path)


def test_a_manifest_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(b'{"mode": "\xff"}')
    with pytest.raises(BundleError, match="not UTF-8"):
        load_bundle(tmp_path)


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    bundle, other = tmp_path / "bundle", tmp_path / "other"
    (other / "a").mkdir(parents=True)
    (other / "a" / "adapter.onnx_adapter").write_bytes(b"x")
    bundle.mkdir()
    (bundle / MANIFEST_NAME).write_text(json.dumps(WHOLE))
    shutil.copytree(other, bundle / "adapters")
    load_bundle(bundle)
    (bundle / "parity").symlink_to(other)  # where goldens would be written
    with pytest.raises(BundleError, match="leads out"):
        load_bundle(bundle)
    (bundle / "parity").unlink()
    file = bundle / "adapters" / "a" / "adapter.onnx_adapter"
    file.unlink()
    file.symlink_to(other / "a" / "adapter.onnx_adapter")
    with pytest.raises(BundleError, match="leads out"):
        load_bundle(bundle)
    shutil.rmtree(bundle / "adapters")
    (bundle / "adapters").symlink_to(other)
    with pytest.raises(BundleError, match="leads out"):
        load_bundle(bundle)


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(WHOLE))
    bundle = load_bundle(tmp_path)
    wrong: Any = replace(bundle.manifest, mode="both")  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="mode is 'both'"):
        bundle.write_manifest(wrong)
    assert load_bundle(tmp_path).manifest == bundle.manifest
