"""Running graphs and bundles with ONNX Runtime. Imports no torch and no onnx."""

from lora_edge.runtime import installed

installed.require()  # before anything imports it

# ruff: noqa: E402
from lora_edge.runtime.adapter_file import read_adapter, write_adapter
from lora_edge.runtime.binding import Binding
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.decoding import Decoding
from lora_edge.runtime.encoder import Encoder
from lora_edge.runtime.image import ImageProcessor
from lora_edge.runtime.pooling import Pooling
from lora_edge.runtime.providers import Provider
from lora_edge.runtime.runner import Runner
from lora_edge.runtime.sentence import SentenceModules, load_sentence_modules

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
