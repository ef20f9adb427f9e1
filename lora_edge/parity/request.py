"""What a validation was asked for: the key of its journal, and a command line that asks again."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import Bundle, hash_file
from lora_edge.parity.in_session import QUICK_STEPS, Settings
from lora_edge.parity.record.environment import Opening, machine, reference_versions, versions


def journal_key(
    bundle: Bundle,
    base: Base | None,
    settings: Settings,
    first: tuple[str, str],
    *,
    low_memory: bool,
) -> dict[str, object]:
    """Everything that the results depend on.

    Args:
        bundle: the bundle.
        base: its base; None: the recorded outputs are compared.
        settings: what was asked for.
        first: the first session's provider and level.
        low_memory: whether it was.
    """
    return {
        "bundle": hash_file(bundle.directory / "lora_edge.json"),
        "base": None if base is None else base.fingerprint(),
        "first session": first,  # which is compared with whole logits
        "low memory": low_memory,
        "versions": versions() | (reference_versions() if base is not None else {}),
        "machine": machine(),
        **dataclasses.asdict(settings),
    }


def command_line(
    bundle: Bundle,
    base: Base | None,
    adapters: Mapping[str, str | os.PathLike[str]],
    opening: Opening,
    settings: Settings,
    *,
    exact: bool,
    low_memory: bool,
) -> str:
    """A command line that makes the report again, but for prompts and examples of the user's.

    Args:
        bundle: the bundle.
        base: its base; None: the recorded outputs were compared.
        adapters: name -> PEFT directory, as given.
        opening: the sessions.
        settings: what was asked for.
        exact: whether drift was left out.
        low_memory: whether it was.
    """
    words = ["lora-edge", "validate", str(bundle.directory)]
    if base is not None:
        words += ["--reference", base.name_or_path]
        words += [x for name, path in adapters.items() for x in ("-a", f"{name}={path}")]
    if settings.depth != "normal":
        words.append(f"--{settings.depth}")
    words += opening.words()
    if exact:
        words.append("--exact")
    if low_memory:
        words.append("--low-memory")
    quick = settings.depth == "quick" and settings.steps == QUICK_STEPS
    if settings.steps is not None and not quick:
        words += ["--steps", str(settings.steps)]
    words += ["--seed", str(settings.seed)]
    return shlex.join(words)
