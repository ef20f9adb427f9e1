"""A bundle -> a small project that runs it, whole or not at all.

The templates are in ``templates/KIND/``. A file ``NAME.j2`` is filled in and written as ``NAME``;
every other file is copied. What differs by what the bundle does lies in ``templates/KIND/VERB/``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lora_edge.bundle.bundle import MANIFEST_NAME, Bundle, load_bundle
from lora_edge.clients.catalog import scripts
from lora_edge.errors import BundleError, OptionError
from lora_edge.files.placing import place
from lora_edge.files.transaction import staging
from lora_edge.kits.facts import AGAIN, common_facts, compiled_facts, size
from lora_edge.kits.kinds import KITS, KitKind
from lora_edge.tasks.task import TASKS

_TEMPLATES = Path(__file__).parent / "templates"
MARKER = "lora_edge_kit.json"
"""The file that shows that a folder is a kit; ``--force`` replaces no other folder."""
_VERBS = {facts.verb for facts in TASKS.values()}
_KNOWN_INPUTS = {
    "input_ids", "attention_mask", "position_ids", "token_type_ids", "num_logits_to_keep",
}  # fmt: skip


class Kit(NamedTuple):
    """A project that was written.

    Attributes:
        directory: its folder.
        commands: what to call in the folder, in order.
    """

    directory: Path
    commands: Sequence[str]


def make_kit(
    bundle: str | os.PathLike[str],
    kind: str,
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    link: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Kit:
    """Write a project that runs a bundle.

    Args:
        bundle: the bundle's folder. Its files are compared with their hashes, and copied.
        kind: one of :data:`KITS`.
        output: the project's folder.
        force: replace an earlier kit in ``output``.
        link: make hard links to the bundle's files, where the file system can do that.
        progress: is told what is done.

    Raises:
        OptionError: there is no such kind, or it does not do what the bundle does.
        BundleError: the bundle is missing, damaged or too old, or has what the kind cannot do; or
            ``output`` is in the way.
    """
    if kind not in KITS:
        raise OptionError(f"there is no kit {kind!r}", f"Kits are: {', '.join(KITS)}.")
    kit, source = KITS[kind], load_bundle(bundle)
    verb = _verb(kit, source)
    known = common_facts(source.manifest, verb) | {"commands": kit.commands[verb]}
    if kit.compiled:
        known |= compiled_facts(source, kit)
    target = Path(output)
    with staging(target, marker=MARKER, force=force) as stage:
        if progress is not None:
            total = sum(entry.bytes for entry in source.manifest.files.values())
            progress(f"{'linking' if link else 'copying'} the bundle, {size(total)}")
        _copy_bundle(source, stage / kit.place, link=link)
        if kit.scripts:
            shutil.copytree(scripts() / "src", stage / "lora-edge")
        _fill(kit.name, verb, stage, known)
        made = {"kit": kit.name, "task": source.manifest.task}
        (stage / MARKER).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return Kit(target, kit.commands[verb])


def _verb(kit: KitKind, bundle: Bundle) -> str:
    """What the project does with the bundle; a refusal where it cannot."""
    manifest = bundle.manifest
    verbs = {name: facts.verb for name, facts in TASKS.items() if _plain(name)}
    taken = {name: verb for name, verb in verbs.items() if verb in kit.verbs}
    verb = taken.get(manifest.task)
    if verb is None:
        raise OptionError(
            f"the bundle's task is {manifest.task}; the kit {kit.name} takes {', '.join(taken)}",
            f"Call it from Python: lora_edge.Runner(bundle).{TASKS[manifest.task].verb}(...).",
        )
    inputs = set(manifest.reads.inputs) - _KNOWN_INPUTS
    if inputs:
        raise BundleError(
            f"the bundle's graph has the input {min(inputs)}, which kits do not feed",
            AGAIN,
        )
    if "tokenizer.json" not in manifest.files and not kit.compiled:
        raise BundleError(
            "the bundle has no tokenizer.json, which kits read texts with",
            "Export the bundle again from a base that has one.",
        )
    return verb


def _plain(task: str) -> bool:
    """Whether one graph reads a text and gives one answer for all of it, or its next token."""
    facts = TASKS[task]
    return (
        facts.driver != "encoder-decoder"
        and facts.takes in ("prompt", "text")
        and not (facts.by_token and facts.verb == "classify")
    )


def _copy_bundle(bundle: Bundle, target: Path, *, link: bool) -> None:
    for name in bundle.manifest.files:
        place(bundle.verify(name), target / name, link=link)
    # Its bytes, and not those of a system with other ends of lines: programs know their hash.
    (target / MANIFEST_NAME).write_bytes(bundle.manifest.to_json().encode())


def _fill(kind: str, verb: str, stage: Path, known: Mapping[str, Any]) -> None:
    """The templates of a kind, and of what it does, filled in."""
    root = _TEMPLATES / kind
    environment = Environment(
        loader=FileSystemLoader(root),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for file in sorted(root.rglob("*")):
        name = place = file.relative_to(root)
        if file.is_dir() or file.name.startswith("_"):
            continue
        if name.parts[0] in _VERBS:
            if name.parts[0] != verb:
                continue
            place = name.relative_to(verb)
        target = stage / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".j2":
            text = environment.get_template(name.as_posix()).render(known)
            target.with_suffix("").write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(file, target)
