"""The export: capture -> passes -> bundle -> self-check -> publish; and adding adapters later.

Nothing is published before the staged bundle has passed the same check that ``validate`` makes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

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
    file_entries,
    hash_file,
    load_bundle,
    staging,
)
from lora_edge.card import bundle_card
from lora_edge.errors import (
    AdapterError,
    BundleError,
    MissingDependencyError,
    ParityError,
)
from lora_edge.names import NONE_ADAPTER
from lora_edge.packing import check_base_of, check_sites, write_adapter_folder, write_none

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
    loaded = [load_adapter(path, name) for name, path in (adapters or {}).items()]
    if mode == "merged" and len(loaded) != 1:
        raise AdapterError(
            f"a merged bundle holds exactly one adapter, got {len(loaded)}",
            "Use --mode switchable for any number of adapters.",
        )
    fingerprint = model.fingerprint()  # reads every weight: a file that is cut off is named here
    for adapter in loaded:
        check_base_of(adapter, fingerprint, model.name_or_path)
    with staging(Path(output), force=force) as stage:
        manifest = _build(model, loaded, mode, stage, form, backend, sites, say)
        staged = Bundle(stage, manifest)
        _prove(staged, model, say)
        _finish(stage)
    return load_bundle(output)


def add(
    bundle: str | os.PathLike[str] | Bundle,
    adapters: Mapping[str, str | os.PathLike[str]],
) -> Bundle:
    """Add adapters to a switchable bundle; its graph and weights are not touched.

    Needs no PyTorch. The adapters are *unproved* until ``validate`` has compared them with PyTorch.

    Args:
        bundle: the bundle or its folder.
        adapters: name -> PEFT directory.

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
    for adapter in loaded:
        if adapter.name in manifest.adapters:
            raise AdapterError(
                f"the bundle already has an adapter {adapter.name!r}", "Choose another name."
            )
        check_base_of(adapter, manifest.base["fingerprint"], manifest.base["name_or_path"])
        check_sites(adapter, manifest.sites, "the bundle's graph")
    entries, files = dict(manifest.adapters), dict(manifest.files)
    written: list[Path] = []
    try:
        for adapter in loaded:
            folder = target.directory / "adapters" / adapter.name
            written.append(folder)
            entries[adapter.name] = write_adapter_folder(
                target.directory, adapter, manifest.sites, manifest.base["fingerprint"]
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
        check_sites(adapter, captured.linears, base.name_or_path)
    model = passes.load(captured.path)
    if captured.spec.form == "fused":
        passes.fuse(model)
        passes.save_graph(model, captured.path)
    say("checking the base graph against PyTorch")
    figures = check_base(captured, base)
    used = {path for adapter in adapters for path in adapter.modules}
    wanted = {
        path: entry
        for path, entry in captured.linears.items()
        if path in used or (sites == "all" and mode == "switchable" and path != captured.head)
    }
    found = passes.find_sites(model, wanted, base.linear_weight)
    graph_file = stage / GRAPH_FILE
    if mode == "merged":
        say(f"merging {adapters[0].name} into {len(used)} weights")
        factors = {path: module.factors() for path, module in adapters[0].modules.items()}
        passes.merge(model, found, factors)
        passes.save_with_data(model, graph_file)
    else:
        say(f"adding branches to {len(found)} linear layers")
        passes.branch(model, found)
        # Beside its data, which is moved and never rewritten.
        passes.save_graph(model, captured.path)
        captured.path.rename(graph_file)
        (raw / "model.onnx_data").rename(stage / DATA_FILE)
    passes.check(graph_file)
    shutil.rmtree(raw)
    fingerprint = base.fingerprint()
    site_entries = wanted if mode == "switchable" else {}
    entries = {}
    if mode == "switchable":
        entries[NONE_ADAPTER] = write_none(stage, site_entries, fingerprint)
    for adapter in adapters:
        entries[adapter.name] = write_adapter_folder(
            stage, adapter, site_entries if mode == "switchable" else None, fingerprint
        )
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
        kinds=("lora",) if mode == "switchable" else (),
        sites=site_entries,
        adapters=entries,
        base_check=figures,
        versions={"lora-edge": __version__, "onnxruntime": version("onnxruntime")}
        | dict(captured.versions),
    )
    return _sign(stage, manifest)


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
