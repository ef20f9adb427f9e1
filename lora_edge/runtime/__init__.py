"""Running graphs and bundles with ONNX Runtime. Imports no torch and no onnx.

Each name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_edge.lazy import attributes
from lora_edge.runtime import installed

installed.require()  # before anything imports it

if TYPE_CHECKING:
    from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
    from lora_edge.bundle.sentence import SentenceModules, load_sentence_modules
    from lora_edge.maths.pooling import Pooling
    from lora_edge.runtime.adapters.binding import Binding
    from lora_edge.runtime.decoder import Decoder
    from lora_edge.runtime.decoding import Decoding
    from lora_edge.runtime.encoder import Encoder
    from lora_edge.runtime.outputs.image import ImageProcessor
    from lora_edge.runtime.providers import Provider
    from lora_edge.runtime.runner import Runner

_LAZY = {
    "Binding": "lora_edge.runtime.adapters.binding",
    "Decoder": "lora_edge.runtime.decoder",
    "Decoding": "lora_edge.runtime.decoding",
    "Encoder": "lora_edge.runtime.encoder",
    "ImageProcessor": "lora_edge.runtime.outputs.image",
    "Pooling": "lora_edge.maths.pooling",
    "Provider": "lora_edge.runtime.providers",
    "Runner": "lora_edge.runtime.runner",
    "SentenceModules": "lora_edge.bundle.sentence",
    "load_sentence_modules": "lora_edge.bundle.sentence",
    "read_adapter": "lora_edge.bundle.onnx_adapter",
    "write_adapter": "lora_edge.bundle.onnx_adapter",
}

__all__ = [
    "Binding",
    "Decoder",
    "Decoding",
    "Encoder",
    "ImageProcessor",
    "Pooling",
    "Provider",
    "Runner",
    "SentenceModules",
    "load_sentence_modules",
    "read_adapter",
    "write_adapter",
]


__getattr__ = attributes(__name__, _LAZY)
