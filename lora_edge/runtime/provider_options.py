"""The options of an execution provider: one that it cannot know is refused."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from lora_edge.errors import OptionError
from lora_edge.targets.target import Target


def libraries(ort_name: str) -> list[Path]:
    """The libraries that can hold a provider of this installation: its own, or ONNX Runtime's."""
    folder = Path(ort.__file__).parent / "capi"
    files = [*folder.glob("*onnxruntime*")]
    own = f"providers_{ort_name.removesuffix('ExecutionProvider').lower()}."
    return [file for file in files if own in file.name] or [
        file for file in files if file.suffix in (".so", ".pyd", ".dll", ".dylib")
    ]


def check_options(found: Target, options: Mapping[str, str], files: list[Path]) -> None:
    """Refuse an option that the provider cannot know: its name is nowhere in its library.

    Many providers pass over what they do not know without a word.
    """
    if found.ort_name == "CPUExecutionProvider" and options:
        raise OptionError(
            f"the CPU provider takes no options, got {', '.join(sorted(options))}",
            "Leave them out, or name the provider that they are for.",
        )
    some = f"Some that it has: {', '.join(found.options)}. " if found.options else ""
    for key in options:
        if files and not any(_mentions(file, key) for file in files):
            raise OptionError(
                f"{found.ort_name} has no option {key!r}",
                f"{some}The documentation of {found.ort_name} lists its options.",
            )


def _mentions(file: Path, word: str) -> bool:
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return word != "" and content.find(word.encode()) >= 0
