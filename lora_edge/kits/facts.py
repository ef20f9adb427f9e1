"""What templates know of a bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.manifest import Manifest
from lora_edge.errors import BundleError, OptionError
from lora_edge.files.json import read_object
from lora_edge.kits.kinds import KitKind
from lora_edge.names import NONE_ADAPTER

AGAIN = "Export the bundle again with this lora-edge."
_SAFE = re.compile(r"[A-Za-z0-9._/-]*")
_FNV, _PRIME = 14695981039346656037, 1099511628211


def common_facts(manifest: Manifest, verb: str) -> dict[str, Any]:
    """What every template knows."""
    names = sorted(name for name in manifest.adapters if name != NONE_ADAPTER)
    merged = manifest.mode == "merged"
    together = [name for name in names if not manifest.adapters[name].alone]
    files = manifest.files
    part = manifest.reads.file
    first = [name for name in files if name == part or name.startswith(f"{part}_data")]
    headed = any("W" in site.parts for site in manifest.sites.values())
    return {
        "verb": verb,
        # The base has no head: its adapters bring theirs, and without one there are no labels.
        "headless": headed and not manifest.adapters[NONE_ADAPTER].labels,
        "task": manifest.task,
        "title": Path(manifest.base["name_or_path"]).name or manifest.base["model_type"],
        "adapters": names,
        "merged": merged,
        "blends": together if len(together) > 1 and not merged else [],
        "size": size(sum(files[name].bytes for name in first)),
        "example": names[0] if names and not merged else "",
    }


def compiled_facts(bundle: Bundle, kit: KitKind) -> dict[str, Any]:
    """What is written into the source of a program that generates text.

    Raises:
        OptionError: the kit does not take its precision.
        BundleError: an adapter has no file for a graph in float16; or a name is not one that source
            code can have between quotes.
    """
    manifest = bundle.manifest
    part = manifest.reads
    adapters: list[dict[str, Any]] = []
    assert part.cache is not None  # a decoder's manifest has one
    if manifest.half and not kit.half:
        raise OptionError(
            f"the bundle is in float16, which the kit {kit.name} cannot feed",
            "Export the bundle without --precision fp16.",
        )
    model_ends = _ends(bundle)
    for name, entry in sorted(manifest.adapters.items()):
        file = entry.half if manifest.half else entry.file
        if manifest.mode == "switchable" and not file:
            raise BundleError(f"the adapter {name} has no file in float16", AGAIN)
        ends = sorted(model_ends | _own_ends(bundle, name))
        invocation = list(entry.invocation)
        adapters.append({"name": name, "file": file, "ends": ends, "invocation": invocation})
    names = [adapter["name"] for adapter in adapters]
    for text in (part.file, *names, *(adapter["file"] for adapter in adapters)):
        if not _SAFE.fullmatch(text):
            raise BundleError(f"{text!r:.100} is no name that this kit can write", AGAIN)
    native = {
        "adapters": adapters,
        "default": NONE_ADAPTER if NONE_ADAPTER in names else names[0],
        "graph": part.file,
        "output": part.output,
        "layers": part.cache.layers,
        "kv_heads": part.cache.kv_heads,
        "head_dim": part.cache.head_dim,
        "half": manifest.half,
        "vocab_size": part.vocab_size,
        "max_length": part.max_length,
        "manifest": _hash(manifest.to_json().encode()),
    }
    own = [name for name in names if "tokenizer" in manifest.adapters[name].text]
    return {
        "native": native,
        "tokenizer": "tokenizer.json" in manifest.files,
        "texts": own if manifest.mode == "switchable" else [],
    }


def _own_ends(bundle: Bundle, name: str) -> set[int]:
    """The end token of the tokenizer that an adapter brings."""
    from tokenizers import Tokenizer  # few adapters need it

    if "tokenizer" not in bundle.manifest.adapters[name].text:
        return set()
    folder = "" if bundle.manifest.mode == "merged" else f"adapters/{name}/text/"

    def read(file: str) -> dict[str, Any]:
        known = f"{folder}{file}" in bundle.manifest.files
        path = bundle.verify(f"{folder}{file}") if known else None
        return read_object(path, BundleError, AGAIN, nonfinite=True) if path else {}

    told = read("tokenizer_config.json")
    if "added_tokens_decoder" not in told:
        told |= read("special_tokens_map.json")
    end = told.get("eos_token")
    text = end.get("content") if isinstance(end, dict) else end
    if not isinstance(text, str):
        return set()
    reader = Tokenizer.from_file(str(bundle.verify(f"{folder}tokenizer.json")))
    token = reader.token_to_id(text)
    return set() if token is None else {token}


def _ends(bundle: Bundle) -> set[int]:
    """The tokens that end a text: where there is a generation_config.json, it alone counts."""
    for name in ("generation_config.json", "config.json"):
        if name in bundle.manifest.files:
            found = read_object(bundle.verify(name), BundleError, AGAIN, nonfinite=True)
            ids = found.get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
                raise BundleError(f"{name}: eos_token_id is {ids!r:.200}, expected ids", AGAIN)
            return set(ids)
    return set()


def _hash(content: bytes) -> int:
    """FNV-1a of 64 bits, which any language has in three lines: a mix-up shows, an attack not."""
    value = _FNV
    for byte in content:
        value = (value ^ byte) * _PRIME & 0xFFFFFFFFFFFFFFFF
    return value


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{max(count / 1e6, 0.1):.1f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"
