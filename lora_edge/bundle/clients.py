"""What other clients of a bundle read: ``config.json`` for transformers.js, ``genai_config.json``.

Knows JSON; knows nothing of the files' places.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from lora_edge.bundle.manifest import Manifest
from lora_edge.names import NUM_LOGITS_TO_KEEP

GENAI_FILE = "genai_config.json"
TRANSFORMERS_JS = "transformers.js_config"

# Of those that onnxruntime-genai 0.18 knows, the types that it runs in one plain loop. A graph says
# by itself what its model does, so that any other decoder runs as a Llama.
_GENAI_TYPES = frozenset(
    {
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
_ANY_LENGTH = 1 << 17  # where positions are relative
_LONGEST_CACHE = 4096  # positions, which genai takes memory for at once
_SAMPLED = ("temperature", "top_k", "top_p", "repetition_penalty")


def client_config(
    config: Mapping[str, Any], manifest: Manifest, architecture: str
) -> dict[str, Any]:
    """A base's ``config.json`` as a bundle has it.

    transformers.js looks for weights beside the graph only where it is told of them, and for
    quantized graphs unless it is told of a dtype; its pipelines take label names from here.

    Args:
        config: the base's own.
        manifest: of the bundle.
        architecture: transformers' class of the model.
    """
    found = {**config, "architectures": [architecture]}
    entries = manifest.adapters.values() if manifest.mode == "merged" else ()
    for labels in (entry.labels for entry in entries if entry.labels):
        found["id2label"] = {str(index): name for index, name in enumerate(labels)}
        found["label2id"] = {name: index for index, name in enumerate(labels)}
    if len(manifest.parts) == 1:
        graph = PurePosixPath(manifest.reads.file).name
        # Its dtype is the end of a file's name, whatever numbers the file holds.
        told = {"dtype": "fp32", "use_external_data_format": {graph: True}}
        cache = {"kv_cache_dtype": "float16"} if manifest.half and manifest.reads.cache else {}
        found[TRANSFORMERS_JS] = {**told, **cache}  # version 4 asks the graph for it
    return found


def genai_config(
    manifest: Manifest, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any] | None:
    """``genai_config.json`` of a bundle; ``None``: onnxruntime-genai has no loop for it.

    Args:
        manifest: of the bundle.
        config: the base's ``config.json``.
        generation: its ``generation_config.json``; empty: it has none.
    """
    part = manifest.parts.get("decoder")
    if part is None or part.cache is None:
        return None
    text = {**config, **(config.get("text_config") or {})}
    told = {**text, **generation}
    ends = told.get("eos_token_id")
    first_end = ends[0] if isinstance(ends, list) and ends else ends
    pad = told.get("pad_token_id")
    length = part.max_length or _ANY_LENGTH
    tokens = {
        "bos_token_id": told.get("bos_token_id"),
        "eos_token_id": ends,
        "pad_token_id": first_end if pad is None else pad,
    }
    kind = str(config.get("model_type"))
    heads = int(text.get("num_attention_heads") or text.get("n_head") or part.cache.kv_heads)
    search = {key: generation[key] for key in _SAMPLED if generation.get(key) is not None}
    return {
        "model": {
            "type": kind if kind in _GENAI_TYPES else "llama",
            "context_length": length,
            "vocab_size": part.vocab_size,
            **{key: value for key, value in tokens.items() if value is not None},
            "decoder": {
                "filename": part.file,
                "hidden_size": int(text.get("hidden_size") or heads * part.cache.head_dim),
                "num_attention_heads": heads,
                "num_key_value_heads": part.cache.kv_heads,
                "num_hidden_layers": part.cache.layers,
                "head_size": part.cache.head_dim,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "inputs": {
                    # Refused as unknown there, and filled all the same.
                    **{name: name for name in part.inputs if name != NUM_LOGITS_TO_KEEP},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": part.output,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **search,
            "do_sample": generation.get("do_sample") is True,
            "max_length": min(length, _LONGEST_CACHE),
            "past_present_share_buffer": part.cache.kind == "shared",
            "num_beams": 1,
        },
    }
