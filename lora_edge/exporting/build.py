"""From a base and adapters to a staged bundle: capture, base check, passes, files, manifest.

Publishes nothing: that is :mod:`lora_edge.exporting.export`'s affair, once the bundle has passed
its check.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lora_edge import __version__
from lora_edge.adapter.load import Adapter
from lora_edge.adapter.loading import BaseView
from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.bundle.adapter_files import with_heads, write_adapter_folder, write_none
from lora_edge.bundle.bundle import exact_file
from lora_edge.bundle.manifest import AdapterEntry, Manifest
from lora_edge.bundle.part import Part, SiteEntry
from lora_edge.bundle.sentence import load_sentence_modules, sentence_files
from lora_edge.errors import MissingDependencyError
from lora_edge.exporting.graphs import Graphs, Progress, Weights, published, write_fast
from lora_edge.exporting.half import check_merged, half_of, write_half
from lora_edge.exporting.options import Options
from lora_edge.exporting.rounding import quantization_of
from lora_edge.exporting.static import with_static
from lora_edge.exporting.survival import Merging, rounded_after_merge
from lora_edge.files.pages import trim
from lora_edge.fit.changes import ParameterChange, parameter_changes, site_changes
from lora_edge.fit.check import (
    changeable,
    check_copies,
    check_kinds,
    check_loads,
    check_modules,
)
from lora_edge.fit.kinds import kind_of, parts_of_kinds
from lora_edge.maths.lora import Head, SiteChange
from lora_edge.maths.quantization import rounded_weights
from lora_edge.names import NONE_ADAPTER, InputPart
from lora_edge.runtime import installed
from lora_edge.tasks.task import EMBEDDING

_COPIED = (
    "config.json", "generation_config.json", "preprocessor_config.json",
)  # fmt: skip


def build(
    base: Base, adapters: Sequence[Adapter], stage: Path, options: Options, say: Progress
) -> tuple[Manifest, Any]:
    """Write a bundle's files into ``stage``; its adapters are not proved yet, its files not hashed.

    Returns:
        The manifest, and the base in PyTorch (:class:`~lora_edge.parity.reference.Reference`).

    Raises:
        MissingDependencyError: the extra ``export`` is not installed.
        BaseModelError, AdapterError: an input is refused.
        CaptureError: the base graph differs from PyTorch.
        GraphError: a graph pass cannot do what the adapters need.
    """
    try:
        from lora_edge import graph as passes
        from lora_edge.capture import capture
        from lora_edge.parity import check_base
        from lora_edge.parity.reference import Reference
        from lora_edge.parity.survival import Survey
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    task, merged = options.task, options.mode == "merged"
    if task.name == EMBEDDING:
        load_sentence_modules(base.directory)  # what cannot be represented is refused here
    raw = stage / "capture"
    raw.mkdir()
    (stage / "onnx").mkdir()
    say(f"capturing {base.name_or_path} ({base.model_type}, {task.name})")
    captured = capture(base, raw, task, form=options.form, backend=options.backend)
    models = {name: passes.load(captured.path(name)) for name in captured.parts}
    weights = _weights(base, captured, models)
    layers, modules = captured.modules, changeable(captured.modules, task)
    for adapter in adapters:
        check_kinds(adapter.settled(modules), captured.modules, task)
    adapters = [adapter.settled(modules) for adapter in adapters]
    for adapter in adapters:
        check_modules(adapter, modules, base.name_or_path, captured.parameter_modules)
        if not captured.parameter_modules:
            check_loads(adapter, BaseView(captured.modules, captured.tied, captured.gives.head))
        check_copies(adapter, weights, captured.tied)
    for name, part in captured.parts.items():
        if part.form == "fused":
            passes.fuse(models[name])
            passes.save_graph(models[name], captured.path(name))
    say("checking the base graph against PyTorch")
    reference = Reference(base, task)
    trim(cycles=reference.large)
    figures = check_base(captured, task, reference)
    trim(cycles=reference.large)  # the session that it ran is gone
    changes: Mapping[str, ParameterChange] = {}
    if merged:
        changes = parameter_changes(adapters[0], modules, captured.tied, captured.parameter_modules)
    quantization, survival = None, None
    unrounded, stored = weights, frozenset[str]()
    if options.half:
        (model,) = models.values()
        matrices = reference.matrices()
        quantization, stored = half_of(base, task, model, matrices, merged=merged, say=say)
        check_merged(changes, modules, adapters[0].name if merged else "")
        if merged and "decoder" in task.parts:
            say(f"measuring what {adapters[0].name} keeps of its effect in float16")
            quantization, survival = rounded_after_merge(
                quantization,
                Merging(changes, layers, captured.tied, weights),
                Survey(base, task, adapters[0], captured.parts, captured.beginning).effect,
                "none",
                options.min_effect,
                adapters[0].name,
                say,
            )
        weights = rounded_weights(weights, quantization, layers)
    elif options.rounding is not None:
        # Adapters bring heads of their own, which are no codes.
        bodies = {path: layer for path, layer in layers.items() if not task.in_head(path)}
        quantization = quantization_of(
            options.rounding, base, captured, models, bodies, weights, say
        )
        if options.keep_high == "touched":
            weights = rounded_weights(weights, quantization, layers)
        else:
            say(f"measuring what {adapters[0].name} keeps of its effect when it is rounded")
            quantization, survival = rounded_after_merge(
                quantization,
                Merging(changes, layers, captured.tied, weights),
                Survey(base, task, adapters[0], captured.parts, captured.beginning).effect,
                options.keep_high,
                options.min_effect,
                adapters[0].name,
                say,
            )
    coded = None if options.half else quantization
    graphs = Graphs(captured, models, modules, unrounded if options.half else weights, coded, stage)
    fingerprint = base.fingerprint()
    base_labels = _base_labels(base, captured)
    fast = options.half or (quantization is not None and options.activations == "int8")
    entries: dict[str, AdapterEntry] = {}
    covered: dict[str, SiteEntry] = {}
    given: dict[str, Mapping[str, SiteChange]] = {}
    if merged:
        say(f"merging {adapters[0].name} into {len(changes)} parameters")
        graphs.write_merged(changes, say)
    else:
        for adapter in adapters:
            given[adapter.name] = site_changes(adapter, modules, weights, captured.tied)
        # The head is the largest site and adapters seldom touch it.
        offered = set(modules) - {captured.head} if options.sites == "all" else set()
        covered = covered_layers(modules, offered, list(given.values()), options.kinds)
        heads = {
            path: _base_head(base, path)
            for path, site in covered.items()
            if "W" in site.parts and base_labels
        }
        given = {name: with_heads(changes, heads) for name, changes in given.items()}
        say(f"adding branches to {len(covered)} layers")
        covered = graphs.write_branched(covered)
        none = write_none(stage, covered, fingerprint, heads, half=options.half)
        entries[NONE_ADAPTER] = dataclasses.replace(none, labels=base_labels)
    if options.half:
        covered = write_half(stage, stored, covered)
    elif fast:
        write_fast(stage, [published(part) for part in captured.parts.values()])
    parts = {
        name: dataclasses.replace(
            part,
            file=published(part),
            exact=exact_file(published(part)) if fast else "",
            inputs=passes.own_inputs(passes.load(stage / published(part))),
            sites={path: x for path, x in covered.items() if captured.part_of(path) == name},
        )
        for name, part in captured.parts.items()
    }
    if options.shapes is not None:
        parts = {name: with_static(stage, x, options, given, say) for name, x in parts.items()}
    for part in parts.values():
        passes.check(stage / part.file)
        if part.exact:
            passes.check(stage / part.exact)
    shutil.rmtree(raw)
    for adapter in adapters:
        own = None if merged else given[adapter.name]
        entry = write_adapter_folder(stage, adapter, covered, own, fingerprint, half=options.half)
        count = adapter.head_labels(captured.head)
        if not entry.labels and (count is None or count == len(base_labels)):
            entry = dataclasses.replace(entry, labels=base_labels)
        entries[adapter.name] = entry
        say_cost(adapter, stage / entry.file, captured.head, say)
    copy_files(base, stage)
    modules = captured.modules
    manifest = manifest_of(options, base, captured, figures, entries, parts, modules, fingerprint)
    made = dataclasses.replace(manifest, quantization=quantization, survival=survival)
    return made, reference


def _weights(base: Base, captured: Any, models: Mapping[str, Any]) -> Weights:
    """The base's parameters, as the graphs have them."""
    from lora_edge import graph as passes

    if len(models) == 1:
        (model,) = models.values()
        return passes.graph_weights(model, captured.modules, base.parameter)
    tied = captured.tied

    def value(path: str) -> NDArray[np.floating] | None:
        found = base.parameter(path)
        if found is None and tied and path == f"{tied[1]}.weight":
            return base.parameter(f"{tied[0]}.weight")
        return found

    return value


def manifest_of(
    options: Options,
    base: Base,
    captured: Any,
    figures: Mapping[str, Any],
    entries: Mapping[str, AdapterEntry],
    parts: Mapping[str, Part],
    modules: Mapping[str, Layer],
    fingerprint: str,
) -> Manifest:
    """The manifest of a bundle whose files are written.

    Args:
        options: how it was built.
        base: its base.
        captured: the :class:`~lora_edge.capture.BaseGraph`.
        figures: of the base check.
        entries: name -> adapter.
        parts: name -> graph, with its layers with inputs.
        modules: module path -> layer that an adapter may change.
        fingerprint: the base's.
    """
    merged = options.mode == "merged"
    covered = {path: site for part in parts.values() for path, site in part.sites.items()}
    return Manifest(
        mode=options.mode,
        task=options.task.name,
        precision=options.precision,
        parts=parts,
        base={
            "name_or_path": base.name_or_path,
            "model_type": base.model_type,
            "fingerprint": fingerprint,
        },
        kinds=tuple(sorted({kind_of(x, part) for x in covered.values() for part in x.parts})),
        adapters=entries,
        base_check=figures,
        versions={"lora-edge": __version__, **installed.versions(), **captured.versions},
        uncovered={
            path: SiteEntry.of(layer, parts=())
            for path, layer in modules.items()
            if not merged and path not in covered
        },
        tied=captured.tied,
        beginning=captured.beginning,
    )


def _base_labels(base: Base, captured: Any) -> tuple[str, ...]:
    """The labels of the base's own task head; empty where it has none."""
    # A head of a vocabulary has no labels.
    labelled = bool(captured.head) and not captured.gives.head
    weight = base.parameter(f"{captured.head}.weight") if labelled else None
    if weight is None:
        return ()
    names = base.config.get("id2label") or {}
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(len(weight)))


def _base_head(base: Base, path: str) -> Head:
    weight, bias = base.parameter(f"{path}.weight"), base.parameter(f"{path}.bias")
    assert weight is not None
    return Head(weight.T, weight[:, 0] * 0 if bias is None else bias)


def copy_files(base: Base, stage: Path) -> None:
    """Copy the base's config files into a bundle, and what its modules.json names.

    Its tokenizer is :mod:`lora_edge.exporting.texts`'.
    """
    for name in (*_COPIED, *sentence_files(base.directory)):
        if name == "tokenizer_config.json":
            continue
        if (base.directory / name).is_file():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.directory / name, stage / name)


def covered_layers(
    modules: Mapping[str, Layer],
    offered: Set[str],
    given: Sequence[Mapping[str, SiteChange]],
    kinds: tuple[str, ...],
) -> dict[str, SiteEntry]:
    """The layers that get inputs, and which: what the kinds offer and what the adapters need."""
    covered = {}
    for path, entry in modules.items():
        wanted = set(parts_of_kinds(entry, kinds)) if path in offered else set()
        for changes in given:
            wanted |= set(changes.get(path, SiteChange()).parts())
        if wanted:
            parts = tuple(part for part in get_args(InputPart) if part in wanted)
            covered[path] = SiteEntry.of(entry, parts)
    return covered


def say_cost(adapter: Adapter, file: Path, head: str, say: Progress) -> None:
    """Say what an adapter costs that replaces whole weights instead of low-rank parts of them."""
    whole = [path for path, x in adapter.saved.items() if x.ndim > 1 and path != f"{head}.weight"]
    if whole and file.is_file():
        say(
            f"{adapter.name} replaces {', '.join(whole)} whole: its file is "
            f"{file.stat().st_size / 1e6:,.1f} MB, and so is what is read for each token"
        )
