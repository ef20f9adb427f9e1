"""Adding adapters to a bundle. Needs no PyTorch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from lora_edge import types as opt
from lora_edge.adapter.load import Adapter, load_adapter
from lora_edge.adapter.loading import BaseView
from lora_edge.adapter.source import peft_directories
from lora_edge.base.checkpoint import Base, resolve_base
from lora_edge.bundle.adapter_files import (
    check_parts,
    check_rank,
    with_heads,
    write_adapter_folder,
)
from lora_edge.bundle.bundle import Bundle, file_entries, load_bundle
from lora_edge.bundle.manifest import AdapterEntry, Manifest
from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.bundle.sentence import write_sentence_modules
from lora_edge.errors import AdapterError, BaseModelError, BundleError
from lora_edge.exporting.texts import own_folders, write_adapter_texts
from lora_edge.files.changing import preparing, recover
from lora_edge.files.portable import check_apart
from lora_edge.fit.changes import site_changes
from lora_edge.fit.check import (
    check_base_of,
    check_copies,
    check_kinds,
    check_loads,
    check_modules,
)
from lora_edge.fit.rename import fitted_to
from lora_edge.maths.lora import Head, SiteChange
from lora_edge.maths.quantization import rounded_weights
from lora_edge.names import NONE_ADAPTER
from lora_edge.runtime.adapters.changes import parse_changes
from lora_edge.tasks.task import Task


def add(
    bundle: str | os.PathLike[str] | Bundle,
    adapters: Mapping[str, str | os.PathLike[str]],
    base: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Add adapters to a switchable bundle; its graph and weights are not touched.

    Needs no PyTorch. The adapters are *unproved* until ``validate`` has compared them with PyTorch.
    One that the bundle has already under that name, from the same files, stays as it is.

    Args:
        bundle: the bundle or its folder.
        adapters: name -> PEFT directory, hub id, or folder of MLX-LM.
        base: the bundle's base model; needed for adapters whose tensors follow from its weights
            (DoRA, trained biases and tokens, ``modules_to_save``).

    Returns:
        The bundle with its new manifest.

    Raises:
        AdapterError: an adapter is refused, has a name that is taken, or changes a layer that the
            graph has no branch for.
        BundleError: the bundle is merged, damaged, or was replaced meanwhile.
    """
    adapters = opt.paths("adapters", adapters)
    target = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    recover(target.directory)
    manifest = target.manifest
    if manifest.mode != "switchable":
        raise BundleError(
            f"{target.directory} is a merged bundle and takes no further adapters",
            "Export a switchable one with: lora-edge export BASE --mode switchable",
        )
    layers = {**manifest.uncovered, **manifest.sites}
    task = Task(manifest.task)
    kind = manifest.base["model_type"]
    with peft_directories(adapters) as paths:
        loaded = [load_adapter(path, name) for name, path in paths.items()]
        with fitted_to(loaded, layers, kind, task, opt.silent) as fitting:
            own = {adapter.name: adapter for adapter in fitting}
            return _add(target, own, base, own_folders(adapters, paths))


def _add(
    target: Bundle,
    adapters: Mapping[str, Adapter],
    base: str | os.PathLike[str] | None,
    folders: Mapping[str, Path],
) -> Bundle:
    manifest = target.manifest
    checkpoint = None if base is None else _checked(resolve_base(base), target).parameter
    layers = {**manifest.uncovered, **manifest.sites}
    weights = checkpoint and rounded_weights(checkpoint, manifest.quantization, layers)
    heads = _base_heads(target)
    changes: dict[str, Mapping[str, SiteChange]] = {}
    loaded = [adapter.settled(layers) for adapter in adapters.values()]
    for adapter in loaded:
        check_apart(adapter.name, adapters, AdapterError)
        if not _is_new(adapter, manifest):
            continue
        adapter.check_mode("switchable")
        check_base_of(adapter, manifest.base["fingerprint"], manifest.base["name_or_path"])
        check_kinds(adapter, layers, Task(manifest.task))
        check_modules(adapter, layers, "the bundle's base")
        check_loads(adapter, BaseView(layers, manifest.tied, manifest.head))
        check_copies(adapter, checkpoint, manifest.tied)
        own = site_changes(adapter, layers, weights, manifest.tied)
        check_parts(adapter, own, layers)
        for part in manifest.parts.values():
            if part.static is not None:
                check_rank(adapter.name, own, part.static)
        changes[adapter.name] = with_heads(own, heads)
        headless = [x for x, site in manifest.sites.items() if "W" in site.parts and x not in own]
        if headless and not heads:
            raise AdapterError(
                f"adapter {adapter.name} brings no task head {headless[0]}, nor has the base one",
                "Save the adapter with modules_to_save, so that its head is saved along.",
            )
    if not changes:
        return target
    with preparing(target.directory) as stage:
        entries = {
            adapter.name: write_adapter_folder(
                stage,
                adapter,
                manifest.sites,
                changes[adapter.name],
                manifest.base["fingerprint"],
                half=manifest.precision == "fp16",
            )
            for adapter in loaded
            if adapter.name in changes
        }
        own_texts = {name: folder for name, folder in folders.items() if name in entries}
        write_sentence_modules(target.directory, manifest.task, own_texts, output=stage)
        whole = dataclasses.replace(manifest, adapters={**manifest.adapters, **entries})
        told = write_adapter_texts(target.directory, whole, own_texts, opt.silent, output=stage)

        def edit(now: Manifest) -> Manifest:
            """Add what is new to what the bundle holds by then."""
            target.check_graph(now)
            # One that was there already, and has gone since, is not half-added.
            new = {x: told.adapters[x] for x in entries if _is_new(adapters[x], now)}
            return _with_adapters(now, new, stage)

        return target.change(stage, edit)


def _is_new(adapter: Adapter, manifest: Manifest) -> bool:
    """Whether a bundle lacks an adapter; it may have it, from the same files, already."""
    known = manifest.adapters.get(adapter.name)
    if known is None:
        check_apart(adapter.name, manifest.adapters, AdapterError)
        return True
    if known.digest != adapter.digest:
        raise AdapterError(
            f"the bundle already has an adapter {adapter.name!r}, from other files",
            "Choose another name, or remove that one first: lora-edge remove BUNDLE NAME",
        )
    return False


def _with_adapters(
    manifest: Manifest, entries: Mapping[str, AdapterEntry], stage: Path
) -> Manifest:
    files = {
        name: entry
        for name, entry in file_entries(stage).items()
        if any(name.startswith(f"adapters/{adapter}/") for adapter in entries)
    }
    return dataclasses.replace(
        manifest,
        adapters={**manifest.adapters, **entries},
        files={**manifest.files, **files},
    )


def _base_heads(bundle: Bundle) -> dict[str, Head]:
    """The base's own task heads, which the adapter ``none`` holds."""
    tensors = read_adapter(bundle.verify(bundle.adapter(NONE_ADAPTER).file))
    changes = parse_changes(NONE_ADAPTER, tensors, bundle.manifest.sites)
    return {path: change.head for path, change in changes.items() if change.head is not None}


def _checked(base: Base, bundle: Bundle) -> Base:
    if base.fingerprint() != bundle.manifest.base["fingerprint"]:
        raise BaseModelError(
            f"{base.name_or_path} has fingerprint {base.fingerprint()[:12]}, the bundle was made "
            f"from {bundle.manifest.base['fingerprint'][:12]}",
            f"Give the bundle's own base: {bundle.manifest.base['name_or_path']}",
        )
    return base
