"""From an encoder-decoder and adapters to a staged bundle of two graphs.

The sites of the encoder's layers are in its graph, all others in the decoder's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.load import Adapter
from lora_edge.adapter.loading import BaseView
from lora_edge.base.checkpoint import Base
from lora_edge.bundle.adapter_files import write_adapter_folder, write_none
from lora_edge.bundle.bundle import DECODER_FILE, ENCODER_FILE
from lora_edge.bundle.manifest import AdapterEntry, Manifest, SiteEntry
from lora_edge.errors import MissingDependencyError, UnsupportedModelError
from lora_edge.exporting.build import (
    Options,
    Progress,
    copy_files,
    covered_layers,
    manifest_of,
    say_cost,
    sign,
)
from lora_edge.fit.changes import parameter_changes, site_changes
from lora_edge.fit.check import Weights, check_copies, check_linear, check_loads, check_modules
from lora_edge.maths.lora import SiteChange
from lora_edge.names import NONE_ADAPTER
from lora_edge.tasks.task import Task


def build_seq2seq(
    base: Base,
    adapters: Sequence[Adapter],
    stage: Path,
    options: Options,
    task: Task,
    say: Progress,
) -> Manifest:
    """Write a bundle of an encoder-decoder into ``stage``; its adapters are not proved yet.

    Raises:
        UnsupportedModelError: the backend is ``trace``.
        UnsupportedAdapterError: an adapter changes something else than linear layers.
        As :func:`lora_edge.exporting.build.build` otherwise.
    """
    if options.backend != "optimum":
        raise UnsupportedModelError(
            f"{base.model_type} models are refused by the trace backend: it traces one graph, and "
            "an encoder-decoder is two",
            "Use --backend optimum, in an environment with lora-edge[optimum].",
        )
    try:
        from lora_edge import graph as passes
        from lora_edge.capture import capture_seq2seq
        from lora_edge.parity import check_seq2seq
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    raw = stage / "capture"
    raw.mkdir()
    (stage / "onnx").mkdir()
    say(f"capturing {base.name_or_path} ({base.model_type}, {task.name})")
    captured = capture_seq2seq(base, raw, task)
    modules = {path: entry for path, entry in captured.modules.items() if entry.kind == "linear"}
    weights = tied_weights(base, captured.tied)
    for adapter in adapters:
        check_linear(adapter, captured.modules)
        check_modules(adapter, modules, base.name_or_path)
        check_loads(adapter, BaseView(captured.modules, captured.tied, captured.head))
        check_copies(adapter, weights, captured.tied)
    say("checking the base graphs against PyTorch")
    figures = check_seq2seq(captured, base, task)
    merged = options.mode == "merged"
    fingerprint = base.fingerprint()
    covered: dict[str, SiteEntry] = {}
    given: dict[str, Mapping[str, SiteChange]] = {}
    entries: dict[str, AdapterEntry] = {}
    if merged:
        changes = parameter_changes(adapters[0], modules, captured.tied)
        say(f"merging {adapters[0].name} into {len(changes)} parameters")
        owners = {path.rpartition(".")[0] for path in changes}
    else:
        changes = {}
        for adapter in adapters:
            given[adapter.name] = site_changes(adapter, modules, weights, captured.tied)
        offered = set(modules) - {captured.head} if options.sites == "all" else set()
        covered = covered_layers(modules, offered, list(given.values()), options.kinds)
        say(f"adding branches to {len(covered)} layers")
        owners = set(covered)
    below = f"{captured.spec.encoder}."
    for file in (ENCODER_FILE, DECODER_FILE):
        source, target = raw / Path(file).name, stage / file
        own = {x for x in sorted(owners) if x.startswith(below) is (file == ENCODER_FILE)}
        layers = {path: SiteEntry.of(x) for path, x in modules.items()} | covered
        model = passes.load(source)
        found = passes.find_sites(model, {x: layers[x] for x in layers if x in own}, weights)
        if merged:
            part = {x: y for x, y in changes.items() if x.rpartition(".")[0] in own}
            passes.merge(model, found, part, weights)
            passes.save_with_data(model, target)
        else:
            passes.branch(model, found)
            # Beside its data, which is moved and never rewritten.
            passes.save_graph(model, source)
            source.rename(target)
            data = source.with_name(f"{source.name}_data")
            data.rename(target.with_name(data.name))
        passes.check(target)
    if not merged:
        entries[NONE_ADAPTER] = write_none(stage, covered, fingerprint, {})
    shutil.rmtree(raw)
    for adapter in adapters:
        own_changes = None if merged else given[adapter.name]
        entry = write_adapter_folder(stage, adapter, covered, own_changes, fingerprint)
        entries[adapter.name] = entry
        say_cost(adapter, stage / entry.file, captured.head, say)
    copy_files(base, stage)
    manifest = manifest_of(
        options, base, captured, figures, entries, covered, captured.modules, fingerprint
    )
    return sign(stage, manifest)


def tied_weights(base: Base, tied: tuple[str, ...]) -> Weights:
    """The checkpoint's parameters; a tied output layer has the embedding's."""

    def value(path: str) -> NDArray[np.floating] | None:
        found = base.parameter(path)
        if found is None and tied and path == f"{tied[1]}.weight":
            return base.parameter(f"{tied[0]}.weight")
        return found

    return value
