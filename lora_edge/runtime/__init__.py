"""Running graphs and bundles with ONNX Runtime. Imports no torch and no onnx."""

from lora_edge.runtime import installed

installed.require()  # before anything imports it

# ruff: noqa: E402
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
