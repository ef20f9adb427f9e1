"""The built library of this device: where it is, and whether it is there."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from lora_edge.runtime.native.rewrite import with_native
from lora_edge.runtime.prepared import Form, processor, user_folder

SWITCH = "LORA_EDGE_NATIVE"
"""``0`` leaves the library out."""

SOURCES = ("lora_sum.cc", "abi.h")
_HINT = "Build it again: lora-edge native build; or leave it out: LORA_EDGE_NATIVE=0."


@dataclass(frozen=True)
class Native:
    """A library that fits this processor and this ONNX Runtime.

    Attributes:
        library: the file.
        form: the form of graphs that need it.
        hint: what to do where it fails.
    """

    library: Path
    form: Form
    hint: str = _HINT


def library_file() -> Path:
    """Where the library of this processor, this ONNX Runtime and these sources belongs."""
    import hashlib  # as in prepared.py

    told = hashlib.sha256("\n".join([ort.__version__, ort.get_build_info(), processor()]).encode())
    for name in SOURCES:
        told.update((Path(__file__).parent / name).read_bytes())
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return _folder() / told.hexdigest()[:24] / f"lora_sum.{suffix}"


def switched_off() -> bool:
    """Whether the user has turned the library off."""
    return os.environ.get(SWITCH) == "0"


def find() -> Native | None:
    """The library, if it is built, fits and is not turned off."""
    if switched_off() or not _folder().is_dir():
        return None
    file = library_file()
    return at(file) if file.is_file() else None


def remove() -> bool:
    """Remove every library that was built; False where there is none."""
    found = _folder().is_dir()
    shutil.rmtree(_folder(), ignore_errors=True)
    return found


def _folder() -> Path:
    return user_folder().parent / "native"


def at(file: Path) -> Native:
    """The library in a file."""
    return Native(file, Form(f"native-{file.parent.name[:8]}", with_native))
