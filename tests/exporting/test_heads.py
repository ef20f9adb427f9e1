"""Task heads of every shape that PEFT saves or adapts: several matrices, low-rank pairs, biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import lora_edge
from lora_edge.errors import LoraEdgeError
from tests.support.encoders import make_encoder, make_encoder_adapter
from tests.support.examples import examples

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="the small encoders are made with transformers 5"
)
TEXTS, IMAGES = "text-classification", "image-classification"


@pytest.mark.parametrize("mode", ["switchable", "merged"])
@pytest.mark.parametrize(
    ("family", "target", "saved"),
    examples(
        [
            ("distilbert", "q_lin", ["pre_classifier", "classifier"]),
            ("modernbert", "Wqkv", ["head", "classifier"]),
            ("roberta", "query", ["classifier", "word_embeddings"]),
            ("electra", "query", ["classifier", "word_embeddings"]),
        ],
        lambda row: row[0] in ("distilbert", "roberta"),
    ),
)
def test_a_head_of_several_matrices(
    family: str, target: str, saved: list[str], mode: Any, tmp_path: Path
) -> None:
    """The base has no head; the adapter's has five labels, and another matrix behind it by name."""
    base = make_encoder(family, "feature-extraction", tmp_path / "base")
    adapter = make_encoder_adapter(
        base, TEXTS, tmp_path / "a", 5,
        task_type="SEQ_CLS", target_modules=[target], modules_to_save=saved,
    )  # fmt: skip
    bundle = lora_edge.export(base, {"a": adapter}, mode, tmp_path / "out")
    assert bundle.manifest.task == TEXTS
    assert bundle.manifest.adapters["a"].proved


@pytest.mark.parametrize("mode", ["switchable", "merged"])
@pytest.mark.parametrize("family", examples(["vit", "dinov2"], ["vit"]))
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, pytest.param({"lora_bias": True}, marks=pytest.mark.long)],
    ids=["lora", "dora", "bias"],
)
def test_a_low_rank_pair_on_the_classifier(
    family: str, settings: dict[str, Any], mode: Any, tmp_path: Path
) -> None:
    """``all-linear`` without a task type takes the classifier along."""
    base = make_encoder(family, IMAGES, tmp_path / "base")
    adapter = make_encoder_adapter(
        base, IMAGES, tmp_path / "a", target_modules="all-linear", **settings
    )
    bundle = lora_edge.export(base, {"a": adapter}, mode, tmp_path / "out")
    assert bundle.manifest.adapters["a"].proved
    if mode == "switchable":
        assert bundle.manifest.adapters["a"].alone
        assert bundle.manifest.sites["classifier"].kind == "head"


def test_a_low_rank_pair_on_a_head_that_nobody_has_is_refused(tmp_path: Path) -> None:
    base = make_encoder("vit", "feature-extraction", tmp_path / "base")
    adapter = make_encoder_adapter(base, IMAGES, tmp_path / "a", target_modules="all-linear")
    with pytest.raises(LoraEdgeError, match="no task head") as caught:
        lora_edge.export(base, {"a": adapter}, output=tmp_path / "out", task=IMAGES)
    assert "classifier" in caught.value.hint


@pytest.mark.parametrize("mode", ["switchable", "merged"])
@pytest.mark.parametrize(
    ("family", "task", "task_type", "target"),
    examples(
        [
            ("roberta", TEXTS, "SEQ_CLS", "query"),
            ("vit", IMAGES, None, "q_proj"),
            ("bert", "feature-extraction", "FEATURE_EXTRACTION", "query"),
            ("distilbert", TEXTS, "SEQ_CLS", "q_lin"),
        ],
        lambda row: row[0] in ("roberta", "vit"),
    ),
)
def test_all_biases(
    family: str, task: str, task_type: str | None, target: str, mode: Any, tmp_path: Path
) -> None:
    base = make_encoder(family, task, tmp_path / "base")
    adapter = make_encoder_adapter(
        base, task, tmp_path / "a", task_type=task_type, target_modules=[target], bias="all"
    )
    bundle = lora_edge.export(base, {"a": adapter}, mode, tmp_path / "out")
    assert bundle.manifest.adapters["a"].proved
