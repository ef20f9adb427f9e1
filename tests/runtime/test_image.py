"""Preparing images equals transformers' Pillow processors exactly; other settings are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from lora_edge.errors import BundleError, DataError, UnsupportedModelError
from lora_edge.runtime.image import ImageProcessor

VIT: dict[str, Any] = {"size": {"height": 18, "width": 22}}
DEIT: dict[str, Any] = {
    "size": {"height": 40, "width": 36},
    "crop_size": {"height": 25, "width": 24},
}
BIT: dict[str, Any] = {"size": {"shortest_edge": 31}, "crop_size": {"height": 28, "width": 28}}
CASES = [
    ("vit", VIT),
    ("vit", VIT | {"resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.9]}),
    ("vit", VIT | {"do_normalize": False}),
    ("vit", VIT | {"do_rescale": False}),
    ("vit", VIT | {"rescale_factor": 1 / 127.5}),
    ("deit", DEIT),
    ("deit", DEIT | {"crop_size": {"height": 51, "width": 50}}),  # larger than the image
    ("deit", DEIT | {"do_resize": False}),
    ("bit", BIT),
]


def _theirs(name: str, settings: dict[str, Any]) -> Any:
    import importlib

    kind = {"vit": "ViT", "deit": "DeiT", "bit": "Bit"}[name]
    module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    return getattr(module, f"{kind}ImageProcessorPil")(**settings)


def _picture(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    """Smooth and noisy parts, so that a wrong filter shows."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 127 + 120 * np.sin(x[..., None] / (2 + np.arange(3)) + y[..., None] / 5)
    noisy = random.integers(0, 256, (height, width, 3))
    pixels = np.where((x < width // 2)[..., None], waves, noisy).astype(np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("size", [(50, 37), (21, 64)])
def test_equal_to_transformers(
    name: str, settings: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    theirs = _theirs(name, settings)
    theirs.save_pretrained(tmp_path)
    picture = _picture(*size)
    wanted = np.asarray(theirs(picture)["pixel_values"])
    found = ImageProcessor.load(tmp_path)([picture, _picture(*size, seed=1)])
    assert (found.dtype, found.shape) == (np.float32, (2, *wanted.shape[1:]))
    np.testing.assert_array_equal(found[0], wanted[0])
    assert np.abs(found[1] - wanted[0]).max() > 0.1


def test_files_arrays_and_modes(tmp_path: Path) -> None:
    process = ImageProcessor(_theirs("vit", VIT).to_dict())
    picture = _picture(30, 41)
    picture.save(tmp_path / "picture.png")
    wanted = process([picture])
    for form in (tmp_path / "picture.png", str(tmp_path / "picture.png"), np.asarray(picture)):
        np.testing.assert_array_equal(process([form]), wanted)
    grey, clear = picture.convert("L"), picture.convert("RGBA")
    assert process([grey]).shape == wanted.shape
    np.testing.assert_array_equal(process([clear]), wanted)
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = process([picture.transpose(PIL.Image.Transpose.ROTATE_180)])
    np.testing.assert_array_equal(process([tmp_path / "turned.png"]), turned)
    assert np.abs(turned - wanted).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor is not known"),
        ({"image_processor_type": None}, "without a type is not known"),
        ({"do_flip": True}, "field do_flip is True"),
        ({"do_pad": True}, "field do_pad is True"),
        ({"data_format": "channels_last"}, "field data_format is 'channels_last'"),
        ({"size": {"longest_edge": 30}}, "expected height and width, or shortest_edge"),
        ({"size": {"shortest_edge": 3, "longest_edge": 30}}, "expected height and width"),
        ({"image_processor_type": "BitImageProcessor", "size": 30}, "its field size is 30"),
        ({"resample": None}, "do_resize is set without resample"),
        ({"do_center_crop": True}, "do_center_crop is set without crop_size"),
    ],
)
def test_unknown_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    config = _theirs("vit", VIT).to_dict()
    ImageProcessor(config)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        ImageProcessor({**config, **changes})
    assert "pixel_values" in caught.value.hint


def test_old_files_with_a_single_size_are_read() -> None:
    old = {
        "feature_extractor_type": "ViTFeatureExtractor",
        "do_resize": True,
        "size": 20,
        "resample": 2,
        "do_normalize": True,
        "image_mean": 0.5,
        "image_std": [0.5, 0.5, 0.5],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    }
    wanted = _theirs("vit", {"size": {"height": 20, "width": 20}})(_picture(30, 41))
    found = ImageProcessor(old)([_picture(30, 41)])
    np.testing.assert_array_equal(found, np.asarray(wanted["pixel_values"]))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    process = ImageProcessor(_theirs("vit", VIT).to_dict())
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png is no image"):
        process([tmp_path / "text.png"])
    whole = tmp_path / "whole.png"
    _picture(64, 64).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    with pytest.raises(DataError, match=r"cut\.png is no image"):
        process([tmp_path / "cut.png"])
    with pytest.raises(DataError, match=r"\[4, 4\] uint8, expected \[height, width, 3\] uint8"):
        process([np.zeros((4, 4), np.uint8)])
    with pytest.raises(DataError, match="expected one shape"):
        process([])
    with pytest.raises(DataError, match="expected one shape"):
        ImageProcessor(_theirs("vit", VIT | {"do_resize": False}).to_dict())(
            [_picture(4, 5), _picture(5, 4)]
        )


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no preprocessor_config\.json"):
        ImageProcessor.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        ImageProcessor.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(_theirs("vit", VIT).to_dict()))
    assert ImageProcessor.load(tmp_path)([_picture(4, 4)]).shape == (1, 3, 18, 22)
