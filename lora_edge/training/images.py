"""A folder of images by label: ``FOLDER/LABEL/IMAGE``.

Knows folders and the runtime's own image processor, so that a model is trained on the pixels that
it will be given; knows nothing of models or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_edge.errors import DataError
from lora_edge.training.data import DataFile, LabelledExample, check_label, label_order, read_data

if TYPE_CHECKING:
    import torch

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

_HINT = f"Give a folder with a folder for each label, with images in it ({', '.join(SUFFIXES)})."


def read_source(path: Path, labels: Sequence[str] | None = None) -> DataFile:
    """Read data of any kind: a file, or a folder of images.

    Args:
        path: the file or folder.
        labels: of the data that was trained on; others are refused. ``None``: these are they.

    Raises:
        DataError: as :func:`read_images` and :func:`~lora_edge.training.data.read_data`.
    """
    return read_images(path, labels) if path.is_dir() else read_data(path, labels)


def read_images(path: Path, labels: Sequence[str] | None = None) -> DataFile:
    """The images of a folder, by label and name; other files are passed over.

    Args:
        path: the folder.
        labels: of the data that was trained on; others are refused. ``None``: these are they.

    Raises:
        DataError: no images, one label only, a label unseen in training, or a file that cannot be
            read.
    """
    rows = []
    digest = hashlib.sha256()
    for file in sorted(path.glob("*/*")):
        if file.suffix.lower() not in SUFFIXES:
            continue
        label = file.parent.name
        if labels is not None:
            try:
                check_label(label, labels)
            except ValueError as error:
                raise DataError(f"{file}: {error}", _HINT) from error
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{file} cannot be read: {error.strerror or error}", "Check the file."
            ) from error
        digest.update(f"{label}/{file.name}\0{len(content)}\0".encode() + content)
        rows.append(LabelledExample(str(file), label, str(file)))
    if not rows:
        raise DataError(f"{path} holds no images by label", _HINT)
    numbers = {all(row.label.isdecimal() for row in rows)}
    chosen = label_order(path, rows, numbers) if labels is None else tuple(labels)
    return DataFile(path, digest.hexdigest(), "image", tuple(rows), chosen)


class Pixels:
    """Reads images as the runtime does."""

    def __init__(self, base: Path) -> None:
        """Take the settings of the base's ``preprocessor_config.json``.

        Raises:
            BundleError, UnsupportedModelError, MissingDependencyError: as
                :class:`~lora_edge.runtime.outputs.image.ImageProcessor`.
        """
        from lora_edge.runtime.outputs.image import ImageProcessor

        self._read = ImageProcessor.load(base)

    def __call__(self, paths: Sequence[str]) -> torch.Tensor:
        """``[batch, 3, height, width] float32``.

        Raises:
            DataError: an image that cannot be read, or unequal sizes.
        """
        import torch

        return torch.from_numpy(self._read(list(paths)))
