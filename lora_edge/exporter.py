"""The export: capture -> passes -> bundle -> self-check -> publish; and adding adapters later.

Nothing is published before the staged bundle has passed the same check that ``validate`` makes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from lora_edge import __version__
from lora_edge.adapter import Adapter, load_adapter
from lora_edge.base import Base, resolve_base
from lora_edge.bundle import (
    DATA_FILE,
    GRAPH_FILE,
    Bundle,
    FileEntry,
    Manifest,
    Mode,
    SiteEntry,
    file_entries,
    hash_file,
    load_bundle,
    staging,
)
from lora_edge.card import bundle_card
from lora_edge.convert import Conversion, converting
from lora_edge.effects import (
    KINDS,
    Weights,
    check_base_of,
    check_copies,
    check_modules,
    kind_of,
    parameter_changes,
    parts_of_kinds,
    site_changes,
)
from lora_edge.errors import (
    AdapterError,
    BaseModelError,
    BundleError,
    MissingDependencyError,
    ParityError,
)
from lora_edge.lora import SiteChange
from lora_edge.names import NONE_ADAPTER, Part
from lora_edge.packing import check_parts, write_adapter_folder, write_none

Progress = Callable[[str], None]

_COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def export(
    base: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    mode: Mode = "switchable",
    output: str | os.PathLike[str] = "bundle",
    *,
    form: Literal["fused", "portable"] = "fused",
    backend: Literal["trace", "optimum"] = "trace",
    sites: Literal["all", "adapters"] = "all",
    kinds: Sequence[str] = ("lora",),
    convert: int | float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a base model and adapters to a bundle, and publish it only if it passes its check.

    Args:
        base: folder of a Hugging Face causal language model, or a hub id.
        adapters: name -> PEFT directory. Merged bundles take exactly one.
        mode: ``switchable`` (adapters are inputs of one graph) or ``merged`` (into the weights).
        output: the folder to make.
        form: ``fused`` (``com.microsoft`` operators) or ``portable`` (standard operators only).
        backend: ``trace``, or ``optimum`` (needs ``lora-edge[optimum]``; has a form of its own).
        sites: put branches on ``all`` linear layers of the decoder (the head only if an adapter
            needs it), or only on those that the ``adapters`` change.
        kinds: kinds of adapters, of ``lora``, ``dora``, ``bias``, ``norm``, ``embedding`` and
            ``conv``, for which a switchable graph gets inputs wherever they are possible, for
            adapters to come. What the given adapters need they get in any case.
        convert: approximate adapters of other types than LoRA by LoRAs of this rank, or, between 0
            and 1, of the ranks that keep this share of each delta's energy; ``None`` refuses them.
            The bundle is proved against the converted adapters; the error of the conversion itself
            goes to ``progress`` and into the manifest.
        force: replace an existing bundle.
        progress: called with one line for each stage.

    Returns:
        The published bundle.

    Raises:
        BaseModelError, AdapterError: an input is refused.
        CaptureError: the base graph differs from PyTorch.
        ParityError: an adapter does not do in the bundle what it does in PyTorch.
        BundleError: ``output`` is in the way.
    """
    say = progress or _silent
    model = resolve_base(base)
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise AdapterError(
            f"{unknown[0]!r} is no kind of adapter", f"Kinds are {', '.join(KINDS)}."
        )
    with converting(adapters or {}, model, convert, say) as (paths, conversions):
        loaded = [load_adapter(path, name) for name, path in paths.items()]
        if mode == "merged" and len(loaded) != 1:
            raise AdapterError(
                f"a merged bundle holds exactly one adapter, got {len(loaded)}",
                "Use --mode switchable for any number of adapters.",
            )
        fingerprint = model.fingerprint()  # reads every weight: one that is cut off is named here
        for adapter in loaded:
            adapter.check_mode(mode)
            check_base_of(adapter, fingerprint, model.name_or_path)
        with staging(Path(output), force=force) as stage:
            manifest = _build(model, loaded, mode, stage, form, backend, sites, tuple(kinds), say)
            staged = Bundle(stage, _note_conversions(stage, manifest, conversions))
            _prove(staged, model, say)
            _finish(stage)
    return load_bundle(output)


def add(
    bundle: str | os.PathLike[str] | Bundle,
    adapters: Mapping[str, str | os.PathLike[str]],
    base: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Add adapters to a switchable bundle; its graph and weights are not touched.

    Needs no PyTorch. The adapters are *unproved* until ``validate`` has compared them with PyTorch.

    Args:
        bundle: the bundle or its folder.
        adapters: name -> PEFT directory.
        base: the bundle's base model; needed for adapters whose tensors follow from its weights
            (DoRA, trained biases and tokens, ``modules_to_save``).

    Returns:
        The bundle with its new manifest.

    Raises:
        AdapterError: an adapter is refused, has a name that is taken, or changes a layer that the
            graph has no branch for.
        BundleError: the bundle is merged, or damaged.
    """
    target = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    manifest = target.manifest
    if manifest.mode != "switchable":
        raise BundleError(
            f"{target.directory} is a merged bundle and takes no further adapters",
            "Export a switchable one with: lora-edge export BASE --mode switchable",
        )
    loaded = [load_adapter(path, name) for name, path in adapters.items()]
    weights = None if base is None else _weights_of(resolve_base(base), target)
    layers = {**manifest.uncovered, **manifest.sites}
    changes: dict[str, Mapping[str, SiteChange]] = {}
    for adapter in loaded:
        if adapter.name in manifest.adapters:
            raise AdapterError(
                f"the bundle already has an adapter {adapter.name!r}", "Choose another name."
            )
        adapter.check_mode("switchable")
        check_base_of(adapter, manifest.base["fingerprint"], manifest.base["name_or_path"])
        check_modules(adapter, layers, "the bundle's base")
        check_copies(adapter, weights, manifest.tied)
        changes[adapter.name] = site_changes(adapter, layers, weights, manifest.tied)
        check_parts(adapter, changes[adapter.name], layers)
    entries, files = dict(manifest.adapters), dict(manifest.files)
    written: list[Path] = []
    try:
        for adapter in loaded:
            folder = target.directory / "adapters" / adapter.name
            written.append(folder)
            entries[adapter.name] = write_adapter_folder(
                target.directory,
                adapter,
                manifest.sites,
                changes[adapter.name],
                manifest.base["fingerprint"],
            )
            for file in folder.rglob("*"):
                if file.is_file():
                    name = file.relative_to(target.directory).as_posix()
                    files[name] = FileEntry(hash_file(file), file.stat().st_size)
        return target.write_manifest(dataclasses.replace(manifest, adapters=entries, files=files))
    except BaseException:
        for folder in written:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _weights_of(base: Base, bundle: Bundle) -> Weights:
    if base.fingerprint() != bundle.manifest.base["fingerprint"]:
        raise BaseModelError(
            f"{base.name_or_path} has fingerprint {base.fingerprint()[:12]}, the bundle was made "
            f"from {bundle.manifest.base['fingerprint'][:12]}",
            f"Give the bundle's own base: {bundle.manifest.base['name_or_path']}",
        )
    return base.parameter


def _silent(line: str) -> None:
    """Progress that nobody listens to."""


def _build(
    base: Base,
    adapters: list[Adapter],
    mode: Mode,
    stage: Path,
    form: Literal["fused", "portable"],
    backend: Literal["trace", "optimum"],
    sites: Literal["all", "adapters"],
    kinds: tuple[str, ...],
    say: Progress,
) -> Manifest:
    try:
        from lora_edge import graph as passes
        from lora_edge.capture import capture
        from lora_edge.parity import check_base
    except ImportError as error:
        raise MissingDependencyError(
            f"exporting needs {error.name}, which is not installed",
            "Install it with: pip install 'lora-edge[export]'",
        ) from error
    raw = stage / "capture"
    raw.mkdir()
    (stage / "onnx").mkdir()
    say(f"capturing {base.name_or_path} ({base.model_type}, {backend}, {form})")
    captured = capture(base, raw, form=form, backend=backend)
    for adapter in adapters:
        check_modules(adapter, captured.modules, base.name_or_path)
        check_copies(adapter, base.parameter, captured.tied)
    model = passes.load(captured.path)
    if captured.spec.form == "fused":
        passes.fuse(model)
        passes.save_graph(model, captured.path)
    say("checking the base graph against PyTorch")
    figures = check_base(captured, base)
    graph_file = stage / GRAPH_FILE
    fingerprint = base.fingerprint()
    entries = {}
    if mode == "merged":
        covered: dict[str, SiteEntry] = {}
        changes = parameter_changes(adapters[0], captured.modules, captured.tied)
        say(f"merging {adapters[0].name} into {len(changes)} parameters")
        owners = {path.rpartition(".")[0] for path in changes} & set(captured.modules)
        layers = {path: captured.modules[path] for path in sorted(owners)}
        found = passes.find_sites(model, layers, base.parameter)
        passes.merge(model, found, changes, base.parameter)
        passes.save_with_data(model, graph_file)
    else:
        given = {
            adapter.name: site_changes(adapter, captured.modules, base.parameter, captured.tied)
            for adapter in adapters
        }
        # The head is the largest site and adapters seldom touch it.
        offered = set(captured.modules) - {captured.head} if sites == "all" else set()
        covered = _covered(captured.modules, offered, list(given.values()), kinds)
        say(f"adding branches to {len(covered)} layers")
        passes.branch(model, passes.find_sites(model, covered, base.parameter))
        # Beside its data, which is moved and never rewritten.
        passes.save_graph(model, captured.path)
        captured.path.rename(graph_file)
        (raw / "model.onnx_data").rename(stage / DATA_FILE)
        entries[NONE_ADAPTER] = write_none(stage, covered, fingerprint, {})
    passes.check(graph_file)
    shutil.rmtree(raw)
    for adapter in adapters:
        own = None if mode == "merged" else given[adapter.name]
        entries[adapter.name] = write_adapter_folder(stage, adapter, covered, own, fingerprint)
        _say_cost(adapter, stage / entries[adapter.name].file, say)
    for name in _COPIED:
        if (base.directory / name).is_file():
            shutil.copyfile(base.directory / name, stage / name)
    manifest = Manifest(
        mode=mode,
        task="text-generation",
        precision="fp32",
        graph=captured.spec,
        base={
            "name_or_path": base.name_or_path,
            "model_type": base.model_type,
            "fingerprint": fingerprint,
        },
        kinds=tuple(sorted({kind_of(x, part) for x in covered.values() for part in x.parts})),
        sites=covered,
        adapters=entries,
        base_check=figures,
        versions={"lora-edge": __version__, "onnxruntime": version("onnxruntime")}
        | dict(captured.versions),
        uncovered={
            path: dataclasses.replace(entry, parts=())
            for path, entry in captured.modules.items()
            if mode == "switchable" and path not in covered
        },
        tied=captured.tied,
    )
    return _sign(stage, manifest)


def _covered(
    modules: Mapping[str, SiteEntry],
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
            parts = tuple(part for part in get_args(Part) if part in wanted)
            covered[path] = dataclasses.replace(entry, parts=parts)
    return covered


def _say_cost(adapter: Adapter, file: Path, say: Progress) -> None:
    """Say what an adapter costs that replaces whole weights instead of low-rank parts of them."""
    whole = [path for path, value in adapter.saved.items() if value.ndim > 1]
    if whole and file.is_file():
        say(
            f"{adapter.name} replaces {', '.join(whole)} whole: its file is "
            f"{file.stat().st_size / 1e6:,.1f} MB, and so is what is read for each token"
        )


def _note_conversions(
    stage: Path, manifest: Manifest, conversions: Mapping[str, Conversion]
) -> Manifest:
    entries = dict(manifest.adapters)
    for name, conversion in conversions.items():
        entries[name] = dataclasses.replace(entries[name], conversion=conversion.facts())
    return _sign(stage, dataclasses.replace(manifest, adapters=entries))


def _prove(staged: Bundle, base: Base, say: Progress) -> None:
    from lora_edge.parity import validate

    say("validating every adapter against PyTorch")
    report = validate(staged, reference=base)
    if not report.passed:
        first = report.failures[0].reason if report.failures else "nothing was compared"
        raise ParityError(
            f"the export is not proved to do what PyTorch does: {first}",
            "Nothing was published. An adapter without effect cannot be proved: is it trained?",
        )


def _finish(stage: Path) -> None:
    staged = load_bundle(stage)
    card = bundle_card(staged.manifest)
    (stage / "README.md").write_text(card, encoding="utf-8")
    staged.write_manifest(_sign(stage, staged.manifest))


def _sign(stage: Path, manifest: Manifest) -> Manifest:
    signed = dataclasses.replace(manifest, files=file_entries(stage))
    Bundle(stage, manifest).write_manifest(signed)
    return signed
