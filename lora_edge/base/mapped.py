"""Weights of a model that PyTorch reads where its checkpoint is mapped, instead of a copy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_edge.files.pages import MappedFiles


class Mapped:
    """The matrices of a model that are mapped from its checkpoint, and as they are there."""

    def __init__(self, model: Any, files: Iterable[Path]) -> None:
        """Note them, before anything is attached to the model."""
        self._files = MappedFiles(files)
        # PyTorch counts what is written to a tensor.
        self._known = {
            id(x): (x, x._version)
            for x in model.parameters()
            if x.ndim > 1 and self._files.hold(x.data_ptr(), x.nbytes)
        }

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of them, and nothing was written to it."""
        known = self._known.get(id(tensor))
        return known is not None and known[0]._version == known[1]

    def give_back(self, tensor: Tensor) -> None:
        """Let the system take its memory; who reads the tensor again reads the file again."""
        if tensor in self:
            self._files.give_back(tensor.data_ptr(), tensor.nbytes)
