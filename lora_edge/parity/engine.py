"""Validation: a bundle against PyTorch now, or against the golden cases recorded from it.

Each probe runs the prompts at once and then PyTorch's own greedy continuation token by token, so
that one comparison covers prompt, cache and greedy tokens. A control with a deliberate fault must
fail; where it does not, the case proves nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lora_edge import __version__
from lora_edge.base import Base, resolve_base
from lora_edge.bundle import Bundle, FileEntry, hash_file, load_bundle
from lora_edge.errors import BundleError
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.base_check import shortest_window
from lora_edge.parity.compare import (
    Expected,
    FloatArray,
    Tolerance,
    expect,
    judge,
    limits,
    measure,
    noise,
)
from lora_edge.parity.golden import FOLDER, Golden, golden_path, keep, load_golden, save_golden
from lora_edge.parity.reference import Reference
from lora_edge.parity.report import Case, Report
from lora_edge.parity.states import BASE, Probe, Row, State, adapter_probe, label, plan
from lora_edge.runtime import Runner
from lora_edge.runtime.adapter_file import read_adapter

REPORT_FILE = f"{FOLDER}/report.json"
_STEPS = 64
_FLOOR_ROWS = 2
_FLOOR_TOKENS = 40  # float64 is slow; the noise of a few positions is the noise of all


def validate(
    bundle: str | os.PathLike[str] | Bundle,
    reference: str | os.PathLike[str] | Base | None = None,
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    provider: str = "cpu",
    steps: int = _STEPS,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Check that a bundle does what PyTorch does.

    With ``reference``, against eager PEFT in float32. An adapter that passes and was unproved is
    marked as proved, and its golden cases are recorded. Without, against the golden cases (needs no
    PyTorch); an adapter without any is unproved, which is not a pass.

    Args:
        bundle: the bundle or its folder.
        reference: the base model: a folder, a hub id, or an open base.
        adapters: PEFT directories of adapters whose files the bundle does not hold.
        provider: execution provider of the bundle's side.
        steps: greedy tokens after each prompt (with ``reference``).
        seed: of the random prompts.
        progress: called with a line for each probe.

    Raises:
        BundleError: a file of the bundle is damaged, or the reference is another base.
    """
    started = time.monotonic()
    target = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    target.verify_all()
    names = tuple(sorted(set(target.manifest.adapters) - {NONE_ADAPTER}))
    runner = Runner(target, provider)
    versions = {"lora-edge": __version__, "onnxruntime": version("onnxruntime")}
    goldens: list[Golden]
    if reference is None:
        against, goldens = "goldens", _recorded(target)
        for golden in goldens:
            versions |= golden.versions
    else:
        against = "reference"
        base = reference if isinstance(reference, Base) else resolve_base(reference)
        goldens = list(_ask(target, base, names, adapters or {}, steps, seed, progress))
        versions |= goldens[0].versions if goldens else {}
    cases: list[Case] = []
    for golden in goldens:
        if progress is not None:
            progress(f"comparing {golden.probe.name}")
        cases += _compare(runner, golden, target.manifest.mode == "merged")
    cases += _switching(runner, goldens)
    covered = {golden.probe.adapters[0] for golden in goldens if golden.probe.kind == "adapter"}
    cases += [
        Case(
            f"adapter {name}",
            (name,),
            "unproved",
            f"{name}: it has not been compared with PyTorch; run validate with --reference",
        )
        for name in names
        if name not in covered
    ]
    report = Report(
        bundle=str(target.directory),
        mode=target.manifest.mode,
        against="reference" if against == "reference" else "goldens",
        adapters=names,
        cases=tuple(cases),
        versions=versions,
        seconds=time.monotonic() - started,
    )
    if reference is not None:
        _record(target, report, goldens)
    return report


def _recorded(bundle: Bundle) -> list[Golden]:
    names = [name for name in bundle.manifest.files if name.startswith(f"{FOLDER}/")]
    return [load_golden(bundle.directory / name) for name in sorted(names) if name.endswith(".npz")]


def _ask(
    bundle: Bundle,
    base: Base,
    names: Sequence[str],
    given: Mapping[str, str | os.PathLike[str]],
    steps: int,
    seed: int,
    progress: Callable[[str], None] | None,
) -> Any:
    """Run the plan through PyTorch; yields a golden case, with whole logits, for each probe."""
    fingerprint = bundle.manifest.base["fingerprint"]
    if base.fingerprint() != fingerprint:
        raise BundleError(
            f"{base.name_or_path} has fingerprint {base.fingerprint()[:12]}, the bundle was made "
            f"from {fingerprint[:12]}",
            f"Give the bundle's own base: {bundle.manifest.base['name_or_path']}",
        )
    reference = Reference(base)
    for name in names:
        directory = Path(given.get(name, bundle.directory / "adapters" / name / "peft"))
        if not directory.is_dir():
            raise BundleError(
                f"the PEFT files of adapter {name} are not in the bundle",
                f"Give their folder with -a {name}=DIR.",
            )
        reference.attach(name, directory)
    spec = bundle.manifest.graph
    probes = plan(
        names,
        vocab_size=spec.vocab_size,
        max_length=spec.max_length,
        steps=steps,
        window=shortest_window(base.config),
        seed=seed,
    )
    if bundle.manifest.mode == "merged":
        rows = probes[0].rows
        probes = (adapter_probe(names[0], rows, probes[0].steps),)
    for probe in probes:
        if progress is not None:
            progress(f"running {probe.name} in PyTorch")
        yield _expected(reference, probe)


def _expected(reference: Reference, probe: Probe) -> Golden:
    tails = tuple(
        reference.greedy([row], state, probe.steps)[0].tokens
        for row, state in zip(probe.rows, probe.states, strict=True)
    )
    whole = [(*row, *tail) for row, tail in zip(probe.rows, tails, strict=True)]
    logits = [row.astype(np.float32) for row in reference.logits(whole, probe.states)]
    bases: list[FloatArray | None] = [None] * len(whole)
    active = [index for index, state in enumerate(probe.states) if state]
    plain = reference.logits([whole[i] for i in active], [BASE] * len(active))
    for index, row in zip(active, plain, strict=True):
        bases[index] = row.astype(np.float32)
    # The floor of the rows that carry most: in a mixed batch, of its first rows.
    sample = [row[:_FLOOR_TOKENS] for row in whole[:_FLOOR_ROWS]]
    states = probe.states[:_FLOOR_ROWS]
    with reference.wide():
        wide = reference.logits(sample, states)
    floor = noise([row[:_FLOOR_TOKENS] for row in logits[:_FLOOR_ROWS]], wide)
    expected = tuple(expect(y, base) for y, base in zip(logits, bases, strict=True))
    return Golden(probe, tails, expected, floor, reference.versions)


def _compare(runner: Runner, golden: Golden, merged: bool) -> list[Case]:
    """One case for a probe; one for each row of a mixed batch."""
    probe = golden.probe
    actual = _observe(runner, probe, golden.tails, merged)
    if probe.kind == "mixed":
        return [
            _judged(
                f"mixed row {index}: {label(state)}",
                state,
                [golden.expected[index]],
                [actual[index]],
                golden,
            )
            for index, state in enumerate(probe.states)
        ]
    case = _judged(probe.name, probe.states[0], golden.expected, actual, golden)
    if probe.kind == "adapter" and case.status == "passed":
        case = _controlled(runner, golden, case, merged)
    return [case]


def _judged(
    name: str,
    state: State,
    expected: Sequence[Expected],
    actual: Sequence[FloatArray],
    golden: Golden,
) -> Case:
    tolerance = Tolerance()
    has_effect = bool(state)
    figures = measure(expected, actual, golden.floor, tolerance)
    limit = limits(figures, golden.floor, tolerance, has_effect=has_effect)
    verdict = judge(name, figures, limit, tolerance, has_effect=has_effect)
    adapters = tuple(adapter for adapter, _ in state)
    return Case(name, adapters, verdict.status, verdict.reason, figures, limit)


def _controlled(runner: Runner, golden: Golden, case: Case, merged: bool) -> Case:
    """Run the comparison with deliberate faults; it must fail with each of them."""
    name = golden.probe.adapters[0]
    tolerance = Tolerance()
    errors: dict[str, float] = {}
    survived: list[str] = []

    def judge_fault(fault: str, actual: Sequence[FloatArray]) -> None:
        figures = measure(golden.expected, actual, golden.floor, tolerance)
        limit = limits(figures, golden.floor, tolerance, has_effect=True)
        errors[fault] = figures.effect_error
        if judge(name, figures, limit, tolerance, has_effect=True).status != "failed":
            survived.append(fault)

    if merged:
        if golden.expected[0].columns is None:
            judge_fault("no effect", [row.base for row in golden.expected if row.base is not None])
    else:
        entry = runner.bundle.adapter(name)
        tensors = read_adapter(runner.bundle.verify(entry.file))
        for fault, factor in (("zeroed", 0.0), ("doubled", 2.0)):
            faulty = {
                key: value * np.float32(factor) if key.endswith(".B") else value
                for key, value in tensors.items()
            }
            runner.override(name, faulty)
            try:
                judge_fault(fault, _observe(runner, golden.probe, golden.tails, merged))
            finally:
                runner.override(name, None)
    if survived:
        reason = f"{name}: the check does not notice the adapter {' or '.join(survived)}"
        return dataclasses.replace(case, status="unproved", reason=reason, controls=errors)
    return dataclasses.replace(case, controls=errors)


def _switching(runner: Runner, goldens: Sequence[Golden]) -> list[Case]:
    """A -> B -> A, bit for bit, for each adapter and its successor, and the base among them."""
    probes = [golden for golden in goldens if golden.probe.kind in ("base", "adapter")]
    cases: list[Case] = []
    for index, golden in enumerate(probes):
        other = probes[(index + 1) % len(probes)]
        if other is golden:
            continue
        first = _observe(runner, golden.probe, golden.tails, merged=False)
        _observe(runner, other.probe, other.tails, merged=False)
        again = _observe(runner, golden.probe, golden.tails, merged=False)
        same = all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        one, two = (label(probe.probe.states[0]) for probe in (golden, other))
        name = f"{one} -> {two} -> {one}, bit for bit"
        reason = "" if same else f"{one}: its outputs differ after {two} was used in between"
        cases.append(Case(name, golden.probe.adapters, "passed" if same else "failed", reason))
    return cases


def _observe(runner: Runner, probe: Probe, tails: Sequence[Row], merged: bool) -> list[FloatArray]:
    """The bundle's logits ``[len(row) + steps, vocab]`` of each row, prompt and continuation."""
    arguments = [dict(state) if state else None for state in probe.states]
    adapter: Any = None if merged else (arguments if probe.kind == "mixed" else arguments[0])
    if not merged and adapter is None:
        adapter = NONE_ADAPTER
    batch = len(probe.rows)
    longest = max(len(row) + len(tail) for row, tail in zip(probe.rows, tails, strict=True))
    decoding = runner.decoder.start(batch, longest, runner.binding(adapter, batch))
    parts = [[row] for row in decoding.extend_all(probe.rows)]
    for tokens in zip(*tails, strict=True):
        for part, logits in zip(parts, decoding.step(tokens), strict=True):
            part.append(logits[None])
    return [np.concatenate(part) for part in parts]


def _record(bundle: Bundle, report: Report, goldens: Sequence[Golden]) -> None:
    """Record the goldens of what passed, and mark it as proved; nothing if nothing is new."""
    manifest = bundle.manifest
    proved = {
        name: entry.proved or report.adapter_passed(name) if name != NONE_ADAPTER else True
        for name, entry in manifest.adapters.items()
    }
    new = any(proved[name] != entry.proved for name, entry in manifest.adapters.items())
    missing = any(golden_path(golden.probe) not in manifest.files for golden in goldens)
    if not (new or missing):
        return
    files = dict(manifest.files)
    written = [
        save_golden(bundle.directory, dataclasses.replace(golden, expected=keep(golden.expected)))
        for golden in goldens
        if all(proved[name] for name in golden.probe.adapters)
    ]
    # The bundle's own folder may move; the report that it carries does not name it.
    own = json.loads(report.to_json()) | {"bundle": "."}
    (bundle.directory / FOLDER).mkdir(exist_ok=True)
    text = json.dumps(own, indent=1) + "\n"
    (bundle.directory / REPORT_FILE).write_text(text, encoding="utf-8")
    for relative in [*written, REPORT_FILE]:
        path = bundle.directory / relative
        files[relative] = FileEntry(hash_file(path), path.stat().st_size)
    entries = {
        name: dataclasses.replace(entry, proved=proved[name])
        for name, entry in manifest.adapters.items()
    }
    bundle.write_manifest(dataclasses.replace(manifest, adapters=entries, files=files))
