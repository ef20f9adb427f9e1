"""Images -> ``pixel_values``, by ``preprocessor_config.json``, as by transformers' Pillow backend.

Needs Pillow (``lora-edge[image]``). transformers' torchvision backend resizes in another way, by up
to a grey level here and there. Knows nothing of sessions or models.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import (
    BundleError,
    DataError,
    MissingDependencyError,
    UnsupportedModelError,
)
from lora_edge.files.json import read_object

Picture = Any
"""A file's path, a ``PIL.Image.Image``, or ``[height, width, 3] uint8``."""

PROCESSOR_FILE = "preprocessor_config.json"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may take a file for: formats that need no other program and no plugin."""
MAX_PIXELS = 50_000_000
"""Of an image that is decoded: 150 MB as RGB."""

_LONGEST_SIDE = 8192
# What Pillow raises for a damaged file depends on its format.
_PILLOW_FAILURES = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, AttributeError,
    OverflowError, EOFError, ZeroDivisionError, MemoryError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip

_HALF, _SQUARE = [0.5, 0.5, 0.5], {"height": 224, "width": 224}
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
# What a file of each kind means where it says nothing: transformers 5, image_processing_pil_*.py.
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "ViT": {
        **_STEPS, "resample": 2, "image_mean": _HALF, "image_std": _HALF, "size": _SQUARE,
        "default_to_square": True,
    },
    "DeiT": {
        **_STEPS, "resample": 3, "image_mean": _HALF, "image_std": _HALF,
        "size": {"height": 256, "width": 256}, "crop_size": _SQUARE, "do_center_crop": True,
        "default_to_square": True,
    },
    "Beit": {
        **_STEPS, "resample": 3, "image_mean": _HALF, "image_std": _HALF, "size": _SQUARE,
        "crop_size": _SQUARE, "do_center_crop": False, "default_to_square": True,
    },
    "Bit": {
        **_STEPS, "resample": 3, "size": {"shortest_edge": 224}, "crop_size": _SQUARE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_center_crop": True, "default_to_square": False,
    },
}  # fmt: skip
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}
_KNOWN = frozenset(
    {
        *_NEEDS,
        *(field for fields in _NEEDS.values() for field in fields),
        "do_convert_rgb",  # always done
        "image_processor_type",
        "feature_extractor_type",
        "processor_class",
        "default_to_square",  # of an int
        "disable_grouping",  # of torchvision's backend
    }
)
# Fields that change nothing at these values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "data_format": (None, "channels_first"),
    "do_pad": (None, False),
    "do_reduce_labels": (None, False),
    "reduce_labels": (None, False),
}


class ImageProcessor:
    """Resizes, crops, rescales and normalizes images as a model was trained with.

    Args:
        config: the content of ``preprocessor_config.json``.

    Raises:
        UnsupportedModelError: a kind of processor, or a setting, that is not known here.
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                "images need Pillow, which is not installed",
                "Install it with: pip install 'lora-edge[image]', or give pixel_values.",
            ) from error
        self._config = _completed(config)

    @staticmethod
    def load(directory: Path) -> ImageProcessor:
        """The processor of a model folder.

        Raises:
            BundleError: the folder has none, or it cannot be read.
            UnsupportedModelError, MissingDependencyError: as the constructor.
        """
        path = directory / PROCESSOR_FILE
        if not path.is_file():
            raise BundleError(
                f"{directory} has no {PROCESSOR_FILE}", "Give pixel_values instead of images."
            )
        return ImageProcessor(read_object(path, BundleError, "Copy it again."))

    def __call__(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """``[batch, 3, height, width] float32``.

        Every image is turned upright by its EXIF data and made RGB, as transformers' pipelines do.

        Raises:
            DataError: no images, one that cannot be read, or images that come out unequal in size.
        UnsupportedModelError: the settings make pixels that are not finite.
        """
        pixels = [self._one(_open(image)) for image in images]
        shapes = sorted({array.shape for array in pixels})
        if len(shapes) != 1:
            raise DataError(
                f"the images come out as {shapes}, expected one shape",
                "Give at least one image; run images of unequal shapes one by one.",
            )
        return np.stack(pixels)

    def _one(self, image: Any) -> NDArray[np.float32]:
        config = self._config
        if config.get("do_resize"):
            height, width = _size(config["size"], image.height, image.width)
            image = image.resize((width, height), resample=int(config["resample"]))
        pixels: NDArray[Any] = np.moveaxis(np.asarray(image), -1, 0)
        if config.get("do_center_crop"):
            pixels = _crop(pixels, *_size(config["crop_size"], *pixels.shape[1:]))
        if config.get("do_rescale"):
            # transformers.image_transforms.rescale: in float64, rounded once
            pixels = pixels.astype(np.float64) * config["rescale_factor"]
        found: NDArray[np.float32] = pixels.astype(np.float32)
        if config.get("do_normalize"):
            mean, std = (
                np.broadcast_to(np.asarray(config[name], np.float32), 3).reshape(3, 1, 1)
                for name in ("image_mean", "image_std")
            )
            with np.errstate(over="ignore", invalid="ignore"):
                found = (found - mean) / std
        if not np.isfinite(found).all():
            _refuse("its numbers make pixels that are not finite")
        return found


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with those of their kind where the file says nothing; checked."""
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    kind = name
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    if kind not in _KINDS:
        _refuse(f"the image processor {name or 'without a type'} is not known")
    for field, value in config.items():
        if field not in _KNOWN and value not in _NEUTRAL.get(field, (None,)):
            _refuse(f"its field {field} is {value!r}, which is not known")
    found = {**_KINDS[kind], **{key: value for key, value in config.items() if key in _KNOWN}}
    for step, fields in _NEEDS.items():
        for field in fields:
            if found.get(step) and found.get(field) is None:
                _refuse(f"{step} is set without {field}")
    for field in ("size", "crop_size"):
        value = found.get(field)
        given = set()
        if isinstance(value, Mapping):
            given = {key for key, number in value.items() if number is not None}
        known = isinstance(value, int) or given in ({"height", "width"}, _SHORTEST)
        if value is not None and not known:
            _refuse(f"its field {field} is {value!r}, expected height and width, or shortest_edge")
    if isinstance(found.get("size"), int) and not found["default_to_square"]:
        found["size"] = {"shortest_edge": found["size"]}
    _check_numbers(found)
    return found


_SHORTEST = {"shortest_edge"}


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{PROCESSOR_FILE} is refused: {reason}",
        "Prepare the images with transformers, and give pixel_values.",
    )


def _size(size: Any, height: int, width: int) -> tuple[int, int]:
    """The height and width that a setting means for an image."""
    if isinstance(size, int):
        return size, size
    if size.get("shortest_edge") is None:
        return int(size["height"]), int(size["width"])
    # transformers.image_transforms.get_resize_output_image_size
    short, long = sorted((height, width))
    new_short = int(size["shortest_edge"])
    new_long = int(new_short * long / short)
    return (new_long, new_short) if width <= height else (new_short, new_long)


def _crop(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """The centre of ``[channels, h, w]``; what it lacks is zero."""
    # transformers.image_transforms.center_crop, which rounds the two cases in opposite ways
    channels, old_height, old_width = pixels.shape
    top, left = (old_height - height) // 2, (old_width - width) // 2
    if top < 0 or left < 0:
        tall, wide = max(height, old_height), max(width, old_width)
        above, beside = -(-(tall - old_height) // 2), -(-(wide - old_width) // 2)
        framed = np.zeros((channels, tall, wide), pixels.dtype)
        framed[:, above : above + old_height, beside : beside + old_width] = pixels
        pixels, top, left = framed, top + above, left + beside
    return pixels[:, top : top + height, left : left + width]


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Numbers that no processor of transformers would have, or that end in NaN."""

    def refuse_unless(fits: bool, field: str) -> None:
        if not fits:
            _refuse(f"its field {field} is {config[field]!r}")

    for field in ("image_mean", "image_std"):
        value = config.get(field)
        numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value] * 3
        if config.get("do_normalize"):
            refuse_unless(len(numbers) == 3 and all(map(_is_finite, numbers)), field)
            refuse_unless(field == "image_mean" or all(x > 0 for x in numbers), field)
    if config.get("do_rescale"):
        factor = config["rescale_factor"]
        refuse_unless(_is_finite(factor) and factor > 0, "rescale_factor")
    if config.get("do_resize"):
        refuse_unless(config["resample"] in range(6), "resample")
    for field in ("size", "crop_size"):
        value = config.get(field)
        sides = list(value.values()) if isinstance(value, Mapping) else [value]
        given = [side for side in sides if side is not None]
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in given)
        refuse_unless(whole and all(0 < x <= _LONGEST_SIDE for x in given), field)
    for field, value in config.items():
        if field.startswith("do_"):
            refuse_unless(value in (None, True, False), field)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _open(image: Picture) -> Any:
    import PIL.Image
    import PIL.ImageOps

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(
                f"an image is {list(image.shape)} {image.dtype}, expected [height, width, 3] uint8",
                "Convert it to RGB bytes.",
            )
        return PIL.Image.fromarray(image)
    what = os.fspath(image) if isinstance(image, str | os.PathLike) else type(image).__name__
    if isinstance(image, PIL.Image.Image):
        return _upright(image, what)
    if not isinstance(image, str | os.PathLike):
        raise DataError(
            f"an image is {what}, expected a file, a PIL image or an array",
            "Give a path, a PIL.Image.Image, or [height, width, 3] uint8.",
        )
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images; the limit here is lower.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            opened = PIL.Image.open(image, formats=FORMATS)
    except (*_PILLOW_FAILURES, PIL.Image.DecompressionBombError) as error:
        raise DataError(
            f"{what} is no image that can be read: {error}",
            f"Give one of these formats: {', '.join(FORMATS)}.",
        ) from error
    with opened:
        return _upright(opened, what)


def _upright(image: Any, what: str) -> Any:
    """The picture turned by its EXIF data, in RGB; nothing is decoded of one that is too large."""
    import PIL.ImageOps

    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"{what} has {image.width} x {image.height} pixels, expected {MAX_PIXELS:,} at most",
            "Make it smaller before it is given to the model, which sees a small square of it.",
        )
    try:
        return PIL.ImageOps.exif_transpose(image).convert("RGB")
    except _PILLOW_FAILURES as error:
        raise DataError(
            f"{what} is no image that can be read: {error}", "Save it again as PNG or JPEG."
        ) from error
