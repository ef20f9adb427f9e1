"""lora-edge: LoRA adapters from PyTorch to ONNX Runtime, exactly, with proof.

The public API. Importing this package imports no torch, transformers, peft or onnxruntime; each
name is loaded when it is first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# ONNX Runtime's official builds upload telemetry unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from lora_edge.errors import (
    AdapterError,
    AdapterNotFoundError,
    BaseModelError,
    BundleError,
    CaptureError,
    DataError,
    GraphError,
    InterruptedRunError,
    LoraEdgeError,
    MissingDependencyError,
    OptionError,
    OutOfMemoryError,
    ParityError,
    ProviderError,
    UnsupportedAdapterError,
    UnsupportedModelError,
)
from lora_edge.lazy import attributes

if TYPE_CHECKING:
    from lora_edge.adapter.load import Adapter, load_adapter
    from lora_edge.bundle.bundle import Bundle, load_bundle
    from lora_edge.exporting.add import add
    from lora_edge.exporting.export import export
    from lora_edge.exporting.remove import remove
    from lora_edge.parity import Report, validate
    from lora_edge.runtime import Runner
    from lora_edge.runtime.set_adapter import set_adapter
    from lora_edge.training import train

__version__ = "0.1.0"

_LAZY = {
    "Adapter": "lora_edge.adapter.load",
    "Bundle": "lora_edge.bundle.bundle",
    "Report": "lora_edge.parity",
    "Runner": "lora_edge.runtime",
    "add": "lora_edge.exporting.add",
    "export": "lora_edge.exporting.export",
    "load_adapter": "lora_edge.adapter.load",
    "load_bundle": "lora_edge.bundle.bundle",
    "remove": "lora_edge.exporting.remove",
    "set_adapter": "lora_edge.runtime.set_adapter",
    "train": "lora_edge.training",
    "validate": "lora_edge.parity",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterNotFoundError",
    "BaseModelError",
    "Bundle",
    "BundleError",
    "CaptureError",
    "DataError",
    "GraphError",
    "InterruptedRunError",
    "LoraEdgeError",
    "MissingDependencyError",
    "OptionError",
    "OutOfMemoryError",
    "ParityError",
    "ProviderError",
    "Report",
    "Runner",
    "UnsupportedAdapterError",
    "UnsupportedModelError",
    "__version__",
    "add",
    "export",
    "load_adapter",
    "load_bundle",
    "remove",
    "set_adapter",
    "train",
    "validate",
]


__getattr__ = attributes(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted(__all__)
