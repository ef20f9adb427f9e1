"""Validation: a bundle against PyTorch now, or against the golden cases recorded from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from lora_edge import __version__
from lora_edge.base import Base, resolve_base
from lora_edge.bundle import Bundle, FileEntry, Seq2SeqSpec, hash_file, load_bundle
from lora_edge.errors import BundleError, DataError
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.checks import compare, greedy, switching
from lora_edge.parity.compare import Tolerance
from lora_edge.parity.golden import (
    FOLDER,
    Golden,
    golden_stems,
    recorded,
    reduce,
    save_golden,
    stem_of,
)
from lora_edge.parity.report import Case, Report
from lora_edge.parity.states import Row
from lora_edge.runtime import Runner
from lora_edge.tasks import TEXT_GENERATION


def validate(
    bundle: str | os.PathLike[str] | Bundle,
    reference: str | os.PathLike[str] | Base | None = None,
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    provider: str = "cpu",
    steps: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Check that a bundle does what PyTorch does.

    With ``reference``, against eager PEFT in float32. The manifest then says of each adapter
    whether it is proved; the golden cases of one that passes for the first time are recorded, and
    one that fails is unproved until it passes again. Without, against the golden cases (needs no
    PyTorch); an unproved adapter is not a pass.

    Args:
        bundle: the bundle or its folder.
        reference: the base model: a folder, a hub id, or an open base.
        adapters: PEFT directories of adapters whose files the bundle does not hold.
        provider: execution provider of the bundle's side.
        steps: greedy tokens after each prompt (with ``reference``); ``None``: 64, or 16 for a base
            of more than 20 M parameters.
        seed: of the random prompts.
        prompts: texts to run besides random tokens (with ``reference``), four at most.
        progress: called with a line for each probe.

    Raises:
        BundleError: a file of the bundle is damaged, or the reference is another base.
        AdapterError: a given PEFT directory is not the adapter that was exported.
        MissingDependencyError: a reference is given, and torch, transformers or peft is missing.
    """
    started = time.monotonic()
    say = progress or _silent
    target = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    target.verify_all()
    names = tuple(sorted(set(target.manifest.adapters) - {NONE_ADAPTER}))
    runner = Runner(target, provider)
    expected: Iterable[Golden]
    if reference is None:
        expected = recorded(target)
    else:
        base = reference if isinstance(reference, Base) else resolve_base(reference)
        rows = [_tokens(runner, text) for text in prompts]
        expected = _asked(target, runner, base, names, adapters or {}, steps, seed, rows, say)
    versions = {"lora-edge": __version__, "onnxruntime": version("onnxruntime")}
    cases: list[Case] = []
    goldens: list[Golden] = []
    for golden in expected:
        say(f"comparing {golden.probe.name}")
        cases += compare(runner, golden, Tolerance())
        # Whole logits of one probe are in memory at a time.
        goldens.append(golden if reference is None else reduce(golden, len(names) + 3))
        versions |= golden.versions
    cases += switching(runner, goldens)
    if reference is None:
        cases += _unproved(target, names, goldens)
    report = Report(
        bundle=str(target.directory),
        mode=target.manifest.mode,
        against="goldens" if reference is None else "reference",
        adapters=names,
        cases=tuple(cases),
        versions=versions,
        seconds=time.monotonic() - started,
    )
    if reference is not None:
        _record(target, report, goldens, say)
    return report


def _asked(
    bundle: Bundle,
    runner: Runner,
    base: Base,
    names: Sequence[str],
    directories: Mapping[str, str | os.PathLike[str]],
    steps: int | None,
    seed: int,
    prompts: Sequence[Row],
    say: Callable[[str], None],
) -> Iterable[Golden]:
    from lora_edge.parity.live import ask_pytorch, sources_of
    from lora_edge.parity.seq2seq_live import ask_pytorch_seq2seq
    from lora_edge.parity.task_live import ask_pytorch_task

    sources = sources_of(bundle, base, names, directories)
    if isinstance(bundle.manifest.graph, Seq2SeqSpec):
        return ask_pytorch_seq2seq(
            bundle,
            base,
            sources,
            steps=steps,
            seed=seed,
            prompts=prompts,
            continued=lambda probe: greedy(runner, probe),
            progress=say,
        )
    if bundle.manifest.task != TEXT_GENERATION:
        return ask_pytorch_task(bundle, base, sources, seed=seed, prompts=prompts, progress=say)
    return ask_pytorch(
        bundle,
        base,
        sources,
        steps=steps,
        seed=seed,
        prompts=prompts,
        continued=lambda probe: greedy(runner, probe),
        progress=say,
    )


def _tokens(runner: Runner, text: str) -> Row:
    graph = runner.bundle.manifest.graph
    if isinstance(graph, Seq2SeqSpec) and graph.features:
        raise DataError("the bundle takes speech, not texts", "Leave the prompts out.")
    if runner.bundle.manifest.task == TEXT_GENERATION or isinstance(graph, Seq2SeqSpec):
        return tuple(runner.tokenizer.encode(text))
    return tuple(runner.outputs.encode([text])[0].ids)


def _silent(line: str) -> None:
    """Progress that nobody listens to."""


def _unproved(bundle: Bundle, names: Sequence[str], goldens: Sequence[Golden]) -> Iterable[Case]:
    covered = {golden.probe.adapters[0] for golden in goldens if golden.probe.kind == "adapter"}
    for name in names:
        if name in covered and bundle.adapter(name).proved:
            continue
        case = f"adapter {name}"
        what = "did not pass when it was last" if name in covered else "was never"
        reason = f"{case}: it {what} compared with PyTorch; validate with --reference BASE"
        yield Case(case, (name,), "unproved", reason)


def _record(
    bundle: Bundle, report: Report, goldens: Sequence[Golden], say: Callable[[str], None]
) -> None:
    """Mark what passed as proved and what did not as unproved, and record new goldens.

    Nothing is written where nothing is new. New files get new names, and the manifest is replaced
    before old files go: whenever it is interrupted, the bundle is whole.
    """
    manifest = bundle.manifest
    entries = dict(manifest.adapters)
    for name in report.adapters:
        passed = report.adapter_passed(name)
        entries[name] = dataclasses.replace(entries[name], proved=passed)
    ready = [g for g in goldens if all(entries[name].proved for name in g.probe.adapters)]
    if entries == dict(manifest.adapters) and {g.stem for g in ready} <= set(golden_stems(bundle)):
        return
    try:
        written = [save_golden(bundle.directory, golden) for golden in ready]
        written.append(_save_report(bundle.directory, report))
        added = {name: _entry(bundle.directory / name) for name in written}
        stems = {golden.stem for golden in ready}
        stale = {
            name
            for name in manifest.files
            if name not in added and (stem_of(name) in stems or _is_report(name))
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
    text = json.dumps(json.loads(report.to_json()) | {"bundle": "."}, indent=1) + "\n"
    relative = f"{FOLDER}/report-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    (directory / FOLDER).mkdir(exist_ok=True)
    (directory / relative).write_text(text, encoding="utf-8")
    return relative


def _is_report(relative: str) -> bool:
    return relative.startswith(f"{FOLDER}/report-")


def _entry(path: Path) -> FileEntry:
    return FileEntry(hash_file(path), path.stat().st_size)
