"""What a validation leaves in the bundle: golden cases, its report, and who is proved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_edge.bundle.bundle import Bundle, file_entry
from lora_edge.bundle.manifest import AdapterEntry, Manifest
from lora_edge.errors import BundleError
from lora_edge.files.changing import preparing
from lora_edge.parity.around.asked import Answers
from lora_edge.parity.around.golden import is_around, load_around, save_around
from lora_edge.parity.record.golden import (
    FOLDER,
    Golden,
    golden_stems,
    is_report,
    save_golden,
    stem_of,
)
from lora_edge.parity.report import Report


def record(
    bundle: Bundle,
    report: Report,
    goldens: Sequence[Golden],
    answers: Answers | None,
    say: Callable[[str], None],
) -> None:
    """Mark what passed as proved and what did not as unproved, and record new goldens.

    Nothing is written where nothing is new. What others have changed in the bundle since it was
    opened stays: only adapters that are still those that were validated get a mark, and golden
    cases of others are not recorded.

    Args:
        bundle: what was validated.
        report: what was found, against PyTorch.
        goldens: reduced cases, to be recorded where all their adapters passed.
        answers: what PyTorch's side gave around the graph, to be recorded where the bundle's gave
            the same.
        say: called with a line where the bundle cannot be written, or has lost an adapter.

    Raises:
        BundleError: what was proved cannot be written, or the bundle was replaced.
    """
    around = [case for case in report.cases if case.kind in {"around", "weights"}]
    if answers is not None and any(case.status != "passed" for case in around):
        answers = None
    if answers is not None and answers == load_around(bundle):
        answers = None  # nothing new
    if answers is None and not _is_new(bundle, report, goldens):
        return
    try:
        with preparing(bundle.directory) as stage:
            own = [_save_report(stage, report)]
            if answers is not None:
                own.append(save_around(stage, answers))
            saved = {save_golden(stage, golden): golden for golden in goldens if _is_kept(golden)}
            entries = {name: file_entry(stage / name) for name in (*own, *saved)}

            def edit(now: Manifest) -> Manifest:
                bundle.check_graph(now)
                lost = {x for x in report.adapters if not is_same_adapter(bundle.manifest, now, x)}
                for name in sorted(lost):
                    say(f"{name} was removed or replaced meanwhile: nothing is recorded of it")
                proved = _marked(bundle.manifest, now, report)
                ready = {
                    file: golden
                    for file, golden in saved.items()
                    if all(x not in lost and proved[x].proved for x in golden.probe.adapters)
                }
                stems = {golden.stem for golden in ready.values()}
                # What PyTorch's side gave around the graph is of the adapters that were there.
                kept = own[:1] if lost else own
                files = {
                    file: entry
                    for file, entry in now.files.items()
                    if stem_of(file) not in stems
                    and not is_report(file)
                    and not (len(kept) > 1 and is_around(file))
                }
                files |= {file: entries[file] for file in (*kept, *ready)}
                return dataclasses.replace(now, adapters=proved, files=files)

            bundle.change(stage, edit)
    except OSError as error:
        if not report.passed:  # the report matters more than that it could not be recorded
            say(f"{bundle.directory} cannot be written ({error.strerror}); it keeps its old record")
            return
        raise BundleError(
            f"what was proved cannot be recorded in {bundle.directory}: {error.strerror}",
            "Make the folder writable, and check the disk space.",
        ) from error


def _is_kept(golden: Golden) -> bool:
    return not golden.probe.given  # the user's own are recorded when they are given


def _is_new(bundle: Bundle, report: Report, goldens: Sequence[Golden]) -> bool:
    marked = _marked(bundle.manifest, bundle.manifest, report)
    known = set(golden_stems(bundle))
    return marked != dict(bundle.manifest.adapters) or any(
        golden.stem not in known and all(marked[name].proved for name in golden.probe.adapters)
        for golden in filter(_is_kept, goldens)
    )


def is_same_adapter(then: Manifest, now: Manifest, name: str) -> bool:
    """Whether an adapter that was validated is still the one in the bundle."""
    folder = f"adapters/{name}/"
    files = [{k: v for k, v in x.files.items() if k.startswith(folder)} for x in (then, now)]
    return name in now.adapters and files[0] == files[1]


def _marked(then: Manifest, now: Manifest, report: Report) -> dict[str, AdapterEntry]:
    marked = dict(now.adapters)
    for name in report.adapters:
        if is_same_adapter(then, now, name):
            passed = report.adapter_passed(name)
            marked[name] = dataclasses.replace(marked[name], proved=passed)
    return marked


def _save_report(directory: Path, report: Report) -> str:
    # The bundle may be moved; the report that it carries does not name its folder.
    own = {"bundle": ".", "command": "lora-edge validate ."}
    text = json.dumps(report.to_data() | own, indent=1, allow_nan=False) + "\n"
    relative = f"{FOLDER}/report-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    (directory / FOLDER).mkdir(exist_ok=True)
    (directory / relative).write_text(text, encoding="utf-8")
    return relative
