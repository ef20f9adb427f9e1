"""Which task a bundle is for: of the adapter's type, of its head, of the base's class, or asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import Base
from lora_edge.errors import (
    AdapterError,
    BaseModelError,
    LoraEdgeError,
    UnsupportedAdapterError,
    UnsupportedModelError,
)
from lora_edge.fit.task import chosen_task
from lora_edge.tasks.task import TEXT

BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 99, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 12,
}  # fmt: skip
VIT: dict[str, Any] = {
    "model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "num_channels": 3,
}  # fmt: skip
LLAMA: dict[str, Any] = BERT | {"model_type": "llama"}
T5: dict[str, Any] = {"model_type": "t5", "is_encoder_decoder": True}


def _base(folder: Path, config: dict[str, Any], architecture: str) -> Base:
    folder.mkdir()
    content = config | ({"architectures": [architecture]} if architecture else {})
    (folder / "config.json").write_text(json.dumps(content))
    save_file({"x": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    return Base(folder, str(folder), content)


def _adapter(
    folder: Path, task_type: str | None, saved: dict[str, tuple[int, ...]] | None = None
) -> Any:
    """An adapter on one layer, which saves parameters of these shapes whole."""
    folder.mkdir()
    paths = saved or {}
    heads = sorted({path.rpartition(".")[0] for path in paths})
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"],
        "task_type": task_type, "modules_to_save": heads or None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        "base_model.model.encoder.query.lora_A.weight": np.ones((2, 8), np.float32),
        "base_model.model.encoder.query.lora_B.weight": np.ones((8, 2), np.float32),
    }
    tensors |= {f"base_model.model.{p}": np.ones(x, np.float32) for p, x in paths.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return load_adapter(folder, "own")


@pytest.mark.parametrize(
    ("config", "architecture", "said"),
    [
        (BERT, "BertForQuestionAnswering", "question answering"),
        (BERT, "BertForMultipleChoice", "multiple choice"),
        (BERT, "BertForMaskedLM", "masked LM"),
        (BERT, "BertForNextSentencePrediction", "next sentence prediction"),
        (BERT, "BertForPreTraining", "pre training"),
        (BERT | {"model_type": "mpnet"}, "MPNetForQuestionAnswering", "question answering"),
        (VIT, "ViTForMaskedImageModeling", "masked image modeling"),
        (VIT | {"model_type": "yolos"}, "YolosForObjectDetection", "object detection"),
        (LLAMA, "LlamaForQuestionAnswering", "question answering"),
    ],
)
def test_a_class_whose_task_is_not_supported_is_refused(
    config: dict[str, Any], architecture: str, said: str, tmp_path: Path
) -> None:
    base = _base(tmp_path / "base", config, architecture)
    with pytest.raises(UnsupportedModelError, match=f"{architecture} .*{said}") as caught:
        chosen_task(base, [_adapter(tmp_path / "a", None)], None, "switchable")
    assert "--task" in caught.value.hint
    found = chosen_task(base, [], "feature-extraction", "switchable")
    assert found is not None
    assert found.name == "feature-extraction"


@pytest.mark.parametrize("architecture", ["LlamaModel", "MistralModel", "GPT2DoubleHeadsModel"])
def test_a_model_that_tells_no_task_is_asked_about(architecture: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", LLAMA, architecture)
    with pytest.raises(BaseModelError, match=f"no task follows .*{architecture}") as caught:
        chosen_task(base, [_adapter(tmp_path / "a", None)], None, "switchable")
    assert "--task" in caught.value.hint


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("mpnet", "MPNetModel"),
        ("bert", "BertModel"),
        ("xlm-roberta", "XLMRobertaModel"),
        ("albert", "AlbertModel"),
        ("deberta-v2", "DebertaV2Model"),
        ("dinov2_with_registers", "Dinov2WithRegistersModel"),
    ],
)
def test_an_encoder_without_a_head_gives_features(
    model_type: str, architecture: str, tmp_path: Path
) -> None:
    base = _base(tmp_path / "base", BERT | {"model_type": model_type}, architecture)
    found = chosen_task(base, [_adapter(tmp_path / "a", None)], None, "switchable")
    assert found is not None
    assert found.name == "feature-extraction"


def test_a_sentence_transformer_gives_features(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", BERT, "BertForMaskedLM")
    (base.directory / "modules.json").write_text("[]")
    found = chosen_task(base, [_adapter(tmp_path / "a", None)], None, "switchable")
    assert found is not None
    assert found.name == "feature-extraction"


def test_a_type_of_encoder_decoders_on_a_decoder_is_said_and_exported(tmp_path: Path) -> None:
    base, said = _base(tmp_path / "base", LLAMA, "LlamaForCausalLM"), list[str]()
    adapter = _adapter(tmp_path / "a", "SEQ_2_SEQ_LM")
    assert chosen_task(base, [adapter], None, "switchable", said.append) == TEXT
    (line,) = said
    assert all(x in line for x in ("own", "SEQ_2_SEQ_LM", "text-generation"))


def test_a_type_of_decoders_on_an_encoder_decoder_is_said(tmp_path: Path) -> None:
    base, said = _base(tmp_path / "base", T5, "T5ForConditionalGeneration"), list[str]()
    adapter = _adapter(tmp_path / "a", "CAUSAL_LM")
    found = chosen_task(base, [adapter], None, "switchable", said.append)
    assert found is not None
    assert found.name == "text2text-generation"
    assert "CAUSAL_LM" in said[0]


@pytest.mark.parametrize("task_type", ["QUESTION_ANS", "telepathy"])
def test_a_task_type_that_is_not_supported_is_refused(task_type: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", BERT, "BertForSequenceClassification")
    adapter = _adapter(tmp_path / "a", task_type)
    with pytest.raises(UnsupportedAdapterError, match=task_type) as caught:
        chosen_task(base, [adapter], None, "switchable")
    assert "--task" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "architecture", "saved", "task"),
    [
        (VIT, "ViTModel", {"classifier.weight": (4, 8)}, "image-classification"),
        (VIT, "ViTForMaskedImageModeling", {"classifier.weight": (4, 8)}, "image-classification"),
        (
            BERT | {"model_type": "distilbert", "dim": 8, "n_heads": 2, "hidden_dim": 12},
            "DistilBertForMaskedLM",
            {"pre_classifier.weight": (8, 8), "classifier.weight": (4, 8)},
            "text-classification",
        ),
        (
            BERT | {"model_type": "roberta"},
            "RobertaForMaskedLM",
            {"classifier.dense.weight": (8, 8), "classifier.out_proj.weight": (4, 8)},
            "text-classification",
        ),
    ],
)
def test_a_saved_head_tells_the_task(
    config: dict[str, Any],
    architecture: str,
    saved: dict[str, tuple[int, ...]],
    task: str,
    tmp_path: Path,
) -> None:
    base = _base(tmp_path / "base", config, architecture)
    found = chosen_task(base, [_adapter(tmp_path / "a", None, saved)], None, "switchable")
    assert found is not None
    assert (found.name, found.num_labels) == (task, 4)


def test_a_head_of_texts_or_tokens_is_asked_about(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", BERT, "BertForMaskedLM")
    adapter = _adapter(tmp_path / "a", None, {"classifier.weight": (4, 8)})
    with pytest.raises(AdapterError, match="classifier") as caught:
        chosen_task(base, [adapter], None, "switchable")
    assert "--task" in caught.value.hint
    assert "token-classification" in caught.value.hint


def test_a_head_for_questions_is_refused(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", BERT, "BertModel")
    adapter = _adapter(tmp_path / "a", None, {"qa_outputs.weight": (2, 8)})
    with pytest.raises(LoraEdgeError, match="question answering"):
        chosen_task(base, [adapter], None, "switchable")


@pytest.mark.parametrize(
    ("config", "saved"),
    [
        # Behind "classifier" in the alphabet, and larger.
        (
            BERT | {"model_type": "distilbert", "dim": 8, "n_heads": 2, "hidden_dim": 12},
            {"pre_classifier.weight": (8, 8), "classifier.weight": (5, 8)},
        ),
        (
            BERT
            | {"model_type": "modernbert", "pad_token_id": 0}
            | dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
            {"head.dense.weight": (8, 8), "classifier.weight": (5, 8)},
        ),
        (
            BERT | {"model_type": "roberta"},
            {
                "classifier.out_proj.weight": (5, 8),
                "classifier.dense.weight": (8, 8),
                "roberta.embeddings.word_embeddings.weight": (99, 8),
            },
        ),
        (
            BERT | {"model_type": "electra", "embedding_size": 8},
            {
                "classifier.out_proj.weight": (5, 8),
                "classifier.dense.weight": (8, 8),
                "electra.embeddings.word_embeddings.weight": (99, 8),
            },
        ),
    ],
)
def test_the_labels_are_counted_where_they_are_made(
    config: dict[str, Any], saved: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    base = _base(tmp_path / "base", config, "ForMaskedLM")
    adapter = _adapter(tmp_path / "a", "SEQ_CLS", saved)
    found = chosen_task(base, [adapter], None, "switchable")
    assert found is not None
    assert found.num_labels == 5
