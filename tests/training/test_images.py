"""A folder of images by label -> a classifier, exported as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

import lora_edge
from lora_edge.errors import DataError
from lora_edge.training import train
from lora_edge.training.images import read_images, read_source
from tests.support.images import PROCESSOR

PIL = pytest.importorskip("PIL.Image", reason="needs lora-edge[image]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Dark, bright and striped images of unequal sizes."""
    random = np.random.default_rng(0)
    for number in range(12):
        label = ("dark", "bright", "striped")[number % 3]
        pixels = random.integers(0, 60, (20 + number, 24, 3), dtype=np.uint8)
        if label == "bright":
            pixels += 190
        if label == "striped":
            pixels[::4] = 255
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        PIL.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    (tmp_path / "images" / "dark" / "notes.txt").write_text("passed over")
    return tmp_path / "images"


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """A ViT without a head."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        initializer_range=0.25,
    )
    base = tmp_path / "vit"
    ViTModel(config, add_pooling_layer=False).save_pretrained(base)
    (base / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return base


def test_images_are_read_by_label_and_name(folder: Path) -> None:
    read = read_source(folder)
    assert (read.kind, read.labels, len(read.rows)) == ("image", ("bright", "dark", "striped"), 12)
    assert Path(str(read.rows[0].where)).parent.name == "bright"
    again = read_images(folder, ("striped", "dark", "bright"))
    assert (again.labels, again.sha256) == (("striped", "dark", "bright"), read.sha256)
    (folder / "dark" / "0.png").rename(folder / "dark" / "00.png")
    assert read_images(folder).sha256 != read.sha256


def test_folders_that_cannot_be_meant_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images by label"):
        read_source(tmp_path / "empty")
    with pytest.raises(DataError, match=r"0\.png: the label 'dark' is not among those trained"):
        read_source(folder, ("bright", "striped"))


def test_a_vision_model_learns_labels_and_is_exported(
    folder: Path, vision: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"rank": 4, "lr": 2e-2, "batch_size": 4, "max_steps": 25}
    notes: list[str] = []
    made = train(vision, folder, tmp_path / "a", notify=notes.append, **options)
    assert notes == ["12 images", "25 steps of 4 examples"]
    record = json.loads((made / "training.json").read_text())
    assert record["labels"] == ["bright", "dark", "striped"]
    assert record["result"]["final_loss"] < 0.3
    config = json.loads((made / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert "image-classification" in (made / "README.md").read_text()
    lora_edge.export(
        vision, {"seen": made}, output=tmp_path / "bundle", task="image-classification"
    )
    runner = lora_edge.Runner(tmp_path / "bundle")
    files = sorted(folder.glob("*/*.png"))
    found = runner.classify([str(file) for file in files], adapter="seen")
    assert [max(one, key=lambda x: x.score).label for one in found] == [
        x.parent.name for x in files
    ]


def test_an_image_that_cannot_be_read_is_named(folder: Path, vision: Path, tmp_path: Path) -> None:
    (folder / "dark" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png"):
        train(vision, folder, tmp_path / "a", max_steps=4, batch_size=12)
    assert not (tmp_path / "a").exists()
