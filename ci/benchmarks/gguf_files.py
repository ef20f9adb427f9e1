"""A checkpoint and an adapter as GGUF files in float32; llama.cpp quantizes the first itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from made import Made
from numpy.typing import NDArray
from safetensors.torch import load_file

Array = NDArray[np.float32]
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_model(made: Made, path: Path) -> None:
    """The base, in float32."""
    shape, kind = made.shape, made.shape.kind
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(made.base().glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            name, array = _named(key), tensor.float().numpy()
            if kind == "llama":
                array = _rotated(key, array, made)
            writer.add_tensor(name, array)
    _finish(writer)


def write_adapter(made: Made, path: Path) -> None:
    """The first adapter, in float32."""
    folder = made.adapter(0)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(path, made.shape.kind)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = (
            key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        )
        array = tensor.float().numpy()
        if part == "B" and made.shape.kind == "llama":
            array = _rotated(f"{module}.weight", array, made)
        writer.add_tensor(f"{_named(f'{module}.weight')}.lora_{part.lower()}", array)
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(key: str) -> str:
    """A tensor's name in a GGUF file."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if key in fixed:
        return fixed[key]
    _, _, layer, rest = key.split(".", 3)
    module, _, part = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[module]}.{part}"


def _rotated(key: str, array: Array, made: Made) -> Array:
    """Rows of q and k in the order in which llama.cpp rotates them."""
    heads = {"q_proj": made.shape.heads, "k_proj": made.shape.kv_heads}.get(key.split(".")[-2])
    if heads is None:
        return array
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
