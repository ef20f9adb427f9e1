"""What to do about an execution provider that does not start, or leaves work to the CPU."""

from __future__ import annotations

from lora_edge.runtime import installed
from lora_edge.runtime.native_log import NativeLog
from lora_edge.targets.target import Target

_ALLOW = "Pass --allow-fallback (allow_fallback=True in Python) to let the CPU run them"


def start_hint(log: NativeLog, found: Target) -> str:
    """What to do about a provider that does not start."""
    if installed.conflict():
        return installed.conflict()
    needed = next((text for text in log.warnings() if "equire" in text), "")
    said = f"ONNX Runtime says: {needed} " if needed else ""
    device = f" Its device is {found.device}." if found.device else ""
    way = f" ({installed.way_to(found)})" if found.packages else ""
    return (
        f"{said}Install what is missing{way}, or choose --provider cpu (provider='cpu' in Python)."
        f"{device}"
    )


def fallback_hint(found: Target) -> str:
    """What to do about nodes that a provider leaves to the CPU: allow it, or export for it."""
    export = "a bundle of --form portable has operators that more providers take."
    if found.runtime_weights is False:
        export = "it multiplies by constant weights only; --mode merged leaves fewer nodes."
    elif found.form is not None:
        export = f"the form to export for it is --form {found.form}."
    fixed = found.dynamic_shapes is False
    shapes = (
        f" It takes fixed shapes only: export with --target {found.name}, which writes a graph "
        "that has them."
        if fixed
        else ""
    )
    newer = f" A newer release may take more: {installed.way_to(found)}." if found.packages else ""
    return f"{_ALLOW}; {export}{shapes}{newer}"
