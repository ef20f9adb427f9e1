"""Preparing images equals transformers' Pillow processors exactly; other settings are refused."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from lora_edge.errors import BundleError, DataError, UnsupportedModelError
from lora_edge.runtime.outputs.image import ImageProcessor

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
        ({"size": [18, 22]}, "its field size is"),
        ({"image_std": 0}, "its field image_std is 0"),
        ({"image_std": [0.5, 0.0, 0.5]}, "its field image_std is"),
        ({"image_std": [0.5, 0.5]}, "its field image_std is"),
        ({"image_mean": [0.5, "x", 0.5]}, "its field image_mean is"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "its field image_mean is"),
        ({"rescale_factor": 0}, "its field rescale_factor is 0"),
        ({"rescale_factor": "1"}, "its field rescale_factor is '1'"),
        ({"resample": 9}, "its field resample is 9"),
        ({"size": {"height": 0, "width": 4}}, "its field size is"),
        ({"size": {"height": 2.5, "width": 4}}, "its field size is"),
        ({"size": {"height": 10**6, "width": 10**6}}, "its field size is"),
        ({"do_resize": "yes"}, "its field do_resize is 'yes'"),
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


@pytest.mark.parametrize("name", ["vit", "deit", "bit"])
def test_what_a_file_leaves_out_is_as_in_transformers(name: str) -> None:
    """Files of years ago name neither do_rescale nor its factor."""
    kind = {"vit": "ViT", "deit": "DeiT", "bit": "Bit"}[name]
    for settings in ({}, {"size": 30}, {"do_normalize": False}):
        wanted = np.asarray(_theirs(name, settings)(_picture(30, 41))["pixel_values"])
        process = ImageProcessor({"feature_extractor_type": f"{kind}FeatureExtractor", **settings})
        np.testing.assert_array_equal(process([_picture(30, 41)]), wanted)


def _saved(form: str) -> bytes:
    buffer = io.BytesIO()
    picture = _picture(8, 8)
    (picture if form != "ICO" else picture.convert("RGBA")).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats_that_are_read(form: str, tmp_path: Path) -> None:
    process = ImageProcessor(_theirs("vit", VIT).to_dict())
    (tmp_path / "x").write_bytes(_saved(form))
    assert process([tmp_path / "x"]).shape == (1, 3, 18, 22)


@pytest.mark.parametrize("form", ["EPS", "PDF", "DDS", "ICO", "AVIF", "PCX", "TGA"])
def test_formats_that_are_not(form: str, tmp_path: Path) -> None:
    """EPS would be handed to another program."""
    process = ImageProcessor(_theirs("vit", VIT).to_dict())
    (tmp_path / "x.png").write_bytes(_saved(form))
    with pytest.raises(DataError, match=r"x\.png is no image") as caught:
        process([tmp_path / "x.png"])
    assert "PNG" in caught.value.hint


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    process = ImageProcessor(_theirs("vit", VIT).to_dict())
    side = 13_300
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(side * (side // 8 + 2)))),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    (tmp_path / "bomb.png").write_bytes(data)
    assert len(data) < 60_000
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb\.png has 13300 x 13300 pixels, expected 50,000,000"):
        process([tmp_path / "bomb.png"])
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_damaged_images_are_read_or_refused(form: str, tmp_path: Path) -> None:
    process = ImageProcessor(_theirs("vit", VIT).to_dict())
    whole = _saved(form)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(0, len(data), random.integers(1, 5)):
            data[place] = random.integers(256)
        (tmp_path / "x").write_bytes(bytes(data[: random.integers(1, len(data) + 1)]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of what it repairs
            try:
                assert np.isfinite(process([tmp_path / "x"])).all()
            except DataError:
                refused += 1
    assert refused > 10


@pytest.mark.parametrize("image", [None, 3, b"png", [[1]]])
def test_what_is_no_picture_is_refused(image: Any) -> None:
    with pytest.raises(DataError, match="expected a file"):
        ImageProcessor(_theirs("vit", VIT).to_dict())([image])


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
