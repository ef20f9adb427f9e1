"""What a validation leaves in the bundle: golden cases, its report, and who is proved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_edge.bundle import Bundle, file_entry
from lora_edge.errors import BundleError
from lora_edge.parity.around.asked import Answers
from lora_edge.parity.around.golden import is_around, load_around, save_around
from lora_edge.parity.golden import FOLDER, Golden, golden_stems, save_golden, stem_of
from lora_edge.parity.report import Report


def record(
    bundle: Bundle,
    report: Report,
    goldens: Sequence[Golden],
    answers: Answers | None,
    say: Callable[[str], None],
) -> None:
    """Mark what passed as proved and what did not as unproved, and record new goldens.

    Nothing is written where nothing is new. New files get new names, and the manifest is replaced
    before old files go: whenever it is interrupted, the bundle is whole.

    Args:
        bundle: what was validated.
        report: what was found, against PyTorch.
        goldens: reduced cases, to be recorded where all their adapters passed.
        answers: what PyTorch's side gave around the graph, to be recorded where the bundle's gave
            the same.
        say: called with a line where the bundle cannot be written.

    Raises:
        BundleError: what was proved cannot be written.
    """
    manifest = bundle.manifest
    entries = dict(manifest.adapters)
    for name in report.adapters:
        passed = report.adapter_passed(name)
        entries[name] = dataclasses.replace(entries[name], proved=passed)
    ready = [
        golden
        for golden in goldens
        # The user's own are recorded when they are given.
        if not golden.probe.given and all(entries[name].proved for name in golden.probe.adapters)
    ]
    around = [case for case in report.cases if case.kind in {"around", "weights"}]
    if answers is not None and any(case.status != "passed" for case in around):
        answers = None
    new = answers is not None and answers != load_around(bundle)
    known = {g.stem for g in ready} <= set(golden_stems(bundle))
    if entries == dict(manifest.adapters) and known and not new:
        return
    try:
        written = [save_golden(bundle.directory, golden) for golden in ready]
        written.append(_save_report(bundle.directory, report))
        if answers is not None and new:
            written.append(save_around(bundle.directory, answers))
        added = {name: file_entry(bundle.directory / name) for name in written}
        stems = {golden.stem for golden in ready}
        stale = {
            name
            for name in manifest.files
            if name not in added
            and (stem_of(name) in stems or _is_report(name) or (new and is_around(name)))
        }
        files = {name: entry for name, entry in manifest.files.items() if name not in stale}
        bundle.write_manifest(
            dataclasses.replace(manifest, adapters=entries, files={**files, **added})
        )
        for name in stale:
            (bundle.directory / name).unlink(missing_ok=True)
    except OSError as error:
        if not report.passed:  # the report matters more than that it could not be recorded
            say(f"{bundle.directory} cannot be written ({error.strerror}); it keeps its old record")
            return
        raise BundleError(
            f"what was proved cannot be recorded in {bundle.directory}: {error.strerror}",
            "Make the folder writable, and check the disk space.",
        ) from error


def _save_report(directory: Path, report: Report) -> str:
    # The bundle may be moved; the report that it carries does not name its folder.
    own = {"bundle": ".", "command": "lora-edge validate ."}
    text = json.dumps(report.to_data() | own, indent=1, allow_nan=False) + "\n"
    relative = f"{FOLDER}/report-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    (directory / FOLDER).mkdir(exist_ok=True)
    (directory / relative).write_text(text, encoding="utf-8")
    return relative


def _is_report(relative: str) -> bool:
    return relative.startswith(f"{FOLDER}/report-")
