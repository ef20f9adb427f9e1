"""The bundle's copies of the base's files, value by value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.clients import GENAI_FILE, TRANSFORMERS_JS, genai_config
from lora_edge.bundle.sentence import MODULES_FILE, SENTENCE_FOLDER, own_sentence_files
from lora_edge.errors import BaseModelError, BundleError
from lora_edge.files.json import read_json
from lora_edge.runtime.outputs.image import PROCESSOR_FILE

_COPIED = ("config.json", "generation_config.json", PROCESSOR_FILE)
_HINT = "Copy it again."
# What export, or another program, writes into config.json, and nothing here reads. The names of
# labels are compared where they are asked for.
_FOREIGN = (TRANSFORMERS_JS, "architectures", "id2label", "label2id")


def compare_files(bundle: Bundle, base: Base) -> Iterator[tuple[str, str]]:
    """Every file that is copied as it is, and what it says otherwise than the base's."""
    folder = bundle.directory
    origin = _sentence_origin(bundle, base)
    # What a tokenizer's file means is compared with the tokenizer.
    sentences = {*own_sentence_files(origin), *own_sentence_files(folder)}
    for name in dict.fromkeys((*_COPIED, *sorted(sentences))):
        theirs = (origin if name in sentences else base.directory) / name
        own = folder / name
        if not theirs.is_file() and not own.is_file():
            continue
        if not own.is_file() or not theirs.is_file():
            where = "the base alone has" if theirs.is_file() else "the base has no"
            yield name, f"{where} {name}"
            continue
        found, wanted = _read(own, BundleError), _read(theirs, BaseModelError)
        if name == "config.json":
            for data in (found, wanted):
                for field in _FOREIGN:
                    data.pop(field, None)
        yield name, first_difference(name, found, wanted)
    if GENAI_FILE in bundle.manifest.files:
        file = base.directory / "generation_config.json"
        generation = _read(file, BaseModelError) if file.is_file() else {}
        made = genai_config(bundle.manifest, base.config, generation)
        found = _read(folder / GENAI_FILE, BundleError)
        yield GENAI_FILE, first_difference(GENAI_FILE, found, made)


def _sentence_origin(bundle: Bundle, base: Base) -> Path:
    """Where the bundle's sentence-transformers files come from: a merged adapter's, or the base."""
    carried = [
        bundle.directory / "adapters" / name / SENTENCE_FOLDER for name in bundle.manifest.adapters
    ]
    found = [x for x in carried if (x / MODULES_FILE).is_file()]
    return found[0] if found and bundle.manifest.mode == "merged" else base.directory


def first_difference(what: str, found: Any, wanted: Any, close: float = 0.0) -> str:
    """Where two JSON values differ first, with both; empty: nowhere.

    Args:
        what: what they are, for people.
        found: one value.
        wanted: the other.
        close: how far two floats may be apart, relative to the larger of 1 and ``wanted``.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys(), key=str):
            if key not in found or key not in wanted:
                has = f"has {found[key]!r}" if key in found else "lacks it"
                said = f"{wanted[key]!r}" if key in wanted else "nothing"
                return f"{what}: {key} {has}, expected {said}"[:400]
            if inner := first_difference(f"{what}: {key}", found[key], wanted[key], close):
                return inner
        return ""
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            if inner := first_difference(f"{what}[{index}]", one, other, close):
                return inner
        return ""
    if isinstance(found, float) and isinstance(wanted, float):
        if abs(found - wanted) <= close * max(1.0, abs(wanted)):
            return ""
    elif found == wanted and isinstance(found, bool) == isinstance(wanted, bool):
        return ""
    return f"{what} is {_short(found)}, expected {_short(wanted)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"


def _read(path: Path, error: type[BundleError] | type[BaseModelError]) -> Any:
    return read_json(path, error, _HINT, nonfinite=True)
