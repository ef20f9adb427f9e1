"""A tiny random model of any architecture of transformers, with a LoRA, and what becomes of it.

The sizes of a config are set by the names of its fields; what that cannot build is in a table. An
export ends *right* (proved against PyTorch), *refused* (one line, by name, with a way out) or in a
*fault*: anything else.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.models.auto import modeling_auto
from transformers.utils import logging

import lora_edge
from lora_edge.errors import LoraEdgeError
from lora_edge.tasks.task import TEXT_GENERATION, Task

Verdict = Literal["right", "refused", "fault", "not made"]
MOST_PARAMETERS = 30_000_000
_LONGEST = 700  # characters of a refusal
_INTERNAL = re.compile(r"lora_edge_[0-9a-f]{8,}|fault of lora-edge|unexpected \w+Error|Traceback")


class Cell(NamedTuple):
    """An architecture and a task."""

    model_type: str
    task: str


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: the verdict, and one line that says why."""

    verdict: Verdict
    reason: str


_MAPPINGS: dict[str, tuple[str, ...]] = {
    TEXT_GENERATION: ("CAUSAL_LM",),
    "text-classification": ("SEQUENCE_CLASSIFICATION",),
    "token-classification": ("TOKEN_CLASSIFICATION",),
    "feature-extraction": ("TEXT_ENCODING", "MASKED_LM", "IMAGE"),
    "image-classification": ("IMAGE_CLASSIFICATION",),
    "text2text-generation": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "automatic-speech-recognition": ("SPEECH_SEQ_2_SEQ",),
}


def cells() -> list[Cell]:
    """Every causal, text-encoding and vision architecture of transformers, and encoder-decoders."""
    found = []
    for task, names in _MAPPINGS.items():
        types = {x for name in names for x in _mapping(name)}
        found += [Cell(model_type, task) for model_type in sorted(types)]
    return found


def _mapping(name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
    return found


_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers",
            "decoder_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks",
            "depth", "encoder_num_layers", "decoder_num_layers", "num_decoder_layer",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "width",
            "word_embed_proj_dim", "embedding_dim", "emb_dim", "d_embed", "encoder_hidden_size",
            "decoder_hidden_size", "model_dim", "projection_dim", "d_embedding", "hidden_dims",
            "conv_dim", "lru_width", "attention_hidden_size", "fusion_hidden_size",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner",
            "hidden_dim", "ffn_hidden_size", "inner_dim", "dense_intermediate_size", "d_inner",
            "dff", "intermediate_size_mlp", "intermediate_dim",
        ),
        96,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads", "heads", "attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank", "kv_channels"), 16),
    "q_lora_rank": 16,
    **dict.fromkeys(
        (
            "moe_intermediate_size", "shared_expert_intermediate_size",
            "shared_intermediate_size", "expert_ffn_hidden_size",
        ),
        40,
    ),
    **dict.fromkeys(
        (
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
            "num_moe_experts", "moe_num_primary_experts",
        ),
        4,
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "attention_window", "local_attention"), 8),
    **dict.fromkeys(
        (
            "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length",
            "max_sequence_length", "max_seq_length",
        ),
        160,
    ),
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
    "query_pre_attn_scalar": 16,
    "rotary_dim": 16,
    "initializer_range": 0.1,
    "chunk_size": 8,
    "mamba_d_state": 8,
    "state_size": 8,
    "ssm_state_size": 8,
}  # fmt: skip
_VOCABULARY = 256
_VOCABULARIES = ("vocab_size", "n_vocab", "n_words", "n_token", "entity_vocab_size",
                 "vocab_size_per_layer_input", "decoder_vocab_size")  # fmt: skip

# What the names of the fields do not tell.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_NO_SHARED_CACHE = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": _NO_SHARED_CACHE,
    "gemma4_unified_assistant": _NO_SHARED_CACHE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {"token_budget": 8, "compress_ratio": 4},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "esm": {"vocab_size": 33},
    "esmc": {"num_key_value_heads": 4},
    "bit": {"num_groups": 4},
    "cvt": {"depth": [1, 2, 3]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.2},
    "perceiver": {"d_latents": 64, "num_latents": 16},
    # Of stages, each half as large as the one before.
    **{name: {"patch_size": 4} for name in ("convnext", "convnextv2")},
    **{name: {"image_size": 64, "patch_size": 2} for name in ("mobilevit", "mobilevitv2")},
}
_WITHOUT: dict[str, tuple[str, ...]] = {"cohere_compass_text": ("rope_parameters",)}


def tiny_config(model_type: str) -> Any:
    """A small config of an architecture: two layers, a width of 64, a vocabulary of 256.

    Raises whatever the architecture's config raises of it.
    """
    kind = transformers.CONFIG_MAPPING[model_type]
    fields = _shrunk(kind().to_dict())
    fields |= copy.deepcopy(_OWN.get(model_type, {}))
    for name in _WITHOUT.get(model_type, ()):
        fields.pop(name, None)
    return kind(**fields)


_CONSTANT = frozenset(
    {
        "model_type", "transformers_version", "architectures", "torch_dtype", "dtype", "auto_map",
        "id2label", "label2id", "_name_or_path", "_attn_implementation_autoset",
        "return_dict", "problem_type", "output_attentions", "output_hidden_states",
    }
)  # fmt: skip


_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_BACKBONE = ("out_features", "out_indices", "stage_names")


def _shrunk(default: Mapping[str, Any]) -> dict[str, Any]:
    fields = {k: v for k, v in default.items() if k not in (*_CONSTANT, *_BACKBONE)}
    found = {k: _small(k, v) for k, v in fields.items()}
    if "pad_token_id" in default and default["pad_token_id"] is None:
        found["pad_token_id"] = 0
    layers = next((default[x] for x in _LAYERS if _is_int(default.get(x))), 0)
    by_layer = {
        k: v for k, v in fields.items() if isinstance(v, list) and layers and len(v) == layers
    }
    kinds = next((by_layer[k] for k in ("layer_types", "layers_block_type") if k in by_layer), [])
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    chosen += list(range(max(chosen, default=-1) + 1, layers))[: max(0, 2 - len(chosen))]
    chosen = sorted(chosen)
    for name, values in by_layer.items():
        found[name] = [_small(name, values[index]) for index in chosen]
    for name, value in fields.items():
        if isinstance(value, dict) and value and all(str(k).isdigit() for k in value):
            found[name] = {k: v for k, v in found[name].items() if int(k) < len(chosen)}
    if layers:
        found |= {name: len(chosen) for name in _LAYERS if name in default}
    return found


def _small(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        own = {"model_type": value["model_type"]} if "model_type" in value else {}
        return _shrunk(value) | own
    if isinstance(value, list) and value and all(_is_int(x) for x in value):
        return _small_list(name, value)
    if value is None and name in ("head_dim", "num_key_value_heads"):
        return _SIZES[name]
    if not _is_int(value):
        return value
    if name in _VOCABULARIES:
        return min(value, _VOCABULARY)
    if name.endswith("token_id") or name.endswith("token_index"):
        return {"pad": 0, "bos": 1, "eos": 2}.get(name[:3], min(value, 3))
    return _SIZES[name] if name in _SIZES and value else value


def _small_list(name: str, values: list[int]) -> list[int]:
    if "depth" in name or "layers" in name or name.endswith("_blocks"):
        return [1] * len(values)
    if "head" in name:
        return [2] * len(values)
    if ("hidden" in name or "dim" in name or "channels" in name) and min(values) >= 16:
        scale = min(values) // 16
        return [max(8, x // scale // 8 * 8) for x in values]
    return values


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES = {
    TEXT_GENERATION: "CAUSAL_LM",
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "feature-extraction": "FEATURE_EXTRACTION",
    "text2text-generation": "SEQ_2_SEQ_LM",
}


def make(cell: Cell, folder: Path) -> tuple[Path, Path]:
    """Save a random base and a LoRA on all its linear layers (or convolutions) into a folder."""
    loader = Task(cell.task).loader
    auto = getattr(transformers, loader)
    config = tiny_config(cell.model_type)
    classes: Mapping[str, Any] = modeling_auto.MODEL_MAPPING_NAMES
    if cell.task != "feature-extraction":
        classes = _mapping(_MAPPINGS[cell.task][0])
    if isinstance(classes.get(cell.model_type), tuple):  # transformers asks which of them
        config.architectures = [classes[cell.model_type][0]]
    with torch.device("meta"):
        size = sum(x.numel() for x in auto.from_config(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters are too many")
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base)
    if not getattr(config, "image_size", None) and model.main_input_name == "pixel_values":
        size = {"height": 64, "width": 64}
        (base / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    settings: dict[str, Any] = {"target_modules": "all-linear"}
    if cell.task in ("text-classification", "token-classification"):
        # Which PEFT saves whole.
        settings["exclude_modules"] = ["classifier", "score", "pre_classifier"]
    if re.search("mamba|falcon_h1|nemotron_h", cell.model_type):
        settings["exclude_modules"] = ["out_proj"]  # as PEFT demands
    if not any(type(x).__name__ in ("Linear", "Conv1D") for x in model.modules()):
        settings = {"target_modules": [p for p, x in model.named_modules() if _plain_conv(x)]}
    lora = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type=_TYPES.get(cell.task), **settings
    )
    get_peft_model(model, lora).save_pretrained(adapter)
    return base, adapter


def _plain_conv(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Conv2d) and module.groups == 1


def outcome(cell: Cell, folder: Path) -> Outcome:
    """Make a cell's model and adapter and export them."""
    with _silence() as noise:
        try:
            base, adapter = make(cell, folder)
        except Exception as error:  # noqa: BLE001 - whatever an architecture or PEFT raises
            return Outcome("not made", f"{type(error).__name__}: {_line(str(error))}")
    with _silence() as noise:
        try:
            lora_edge.export(base, {"lora": adapter}, output=folder / "out", task=cell.task)
        except LoraEdgeError as error:
            return judged(error, noise.getvalue(), cell, folder)
        except Exception as error:  # noqa: BLE001 - these are what is looked for
            frames = traceback.extract_tb(error.__traceback__)
            own = [x for x in frames if "lora_edge" in x.filename][-1]
            where = f"{Path(own.filename).name}:{own.lineno}"
            return Outcome("fault", f"{type(error).__name__} at {where}: {_line(str(error))}")
    return Outcome("right", "")


def judged(error: LoraEdgeError, noise: str, cell: Cell, folder: Path) -> Outcome:
    """A refusal, or a fault where it does not say what, why and what to do in one line."""
    said = str(error).replace(str(folder), "")
    classes = json.loads((folder / "base" / "config.json").read_text())["architectures"] or [""]
    wrong = []
    if not error.hint:
        wrong.append("it has no hint")
    if "\n" in said or len(said) > _LONGEST:
        wrong.append(f"it has {len(said)} characters in {said.count(chr(10)) + 1} lines")
    if _INTERNAL.search(f"{said} {error.hint}"):
        wrong.append("it names what is internal, or calls itself a fault")
    if len(noise) > 1000:
        wrong.append(f"{len(noise)} characters were printed")
    if not any(x in said for x in (cell.model_type, classes[0], "/base", "adapter")):
        wrong.append("it names neither the architecture nor the adapter")
    verdict: Verdict = "fault" if wrong else "refused"
    return Outcome(verdict, _line("; ".join(wrong) + ": " + said if wrong else said))


@contextlib.contextmanager
def _silence() -> Iterator[io.StringIO]:
    """Collect what is printed, by Python and by PyTorch's own C++ alike."""
    noise = io.StringIO()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(noise):
            warnings.simplefilter("ignore")
            yield noise
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _line(text: str) -> str:
    return " ".join(text.split())[:400]
