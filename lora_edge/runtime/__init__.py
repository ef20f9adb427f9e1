"""Running graphs and bundles with ONNX Runtime. Imports no torch and no onnx."""

from lora_edge.runtime.adapter_file import read_adapter, write_adapter
from lora_edge.runtime.binding import Binding
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.decoding import Decoding
from lora_edge.runtime.providers import Provider
from lora_edge.runtime.runner import Runner

__all__ = [
    "Binding",
    "Decoder",
    "Decoding",
    "Provider",
    "Runner",
    "read_adapter",
    "write_adapter",
]
