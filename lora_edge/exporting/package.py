"""Bundles -> a model package of ONNX Runtime (:mod:`lora_edge.bundle.package`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_edge import types as opt
from lora_edge.bundle.bundle import MANIFEST_NAME, Bundle, FileEntry, hash_file, load_bundle
from lora_edge.bundle.package import (
    GRAPHS,
    PACKAGE_FILE,
    SCHEMA_VERSION,
    SHARED_FOLDER,
    Package,
    VariantInfo,
    adapter_uris,
    asset_folder,
    asset_of,
    content_uri,
    load_package,
    variant_body,
)
from lora_edge.errors import OptionError
from lora_edge.files.placing import place
from lora_edge.files.transaction import staging
from lora_edge.targets.providers import PROVIDERS, provider


def write_package(
    bundles: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    link: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Package:
    """Write a model package: a variant for each execution provider, files in common once.

    Args:
        bundles: short name of an execution provider -> the bundle that it gets.
        output: the package's folder.
        force: replace an earlier package in it.
        link: make hard links to the bundles' files, where the file system can do that.
        progress: is told what is done.

    Returns:
        The package, whose every file was compared with its hash.

    Raises:
        OptionError: no bundle, a provider that is not known, or bundles of unlike bases or tasks.
        BundleError: a bundle is missing or damaged, or ``output`` is in the way.
    """
    opened = {_provider(name): load_bundle(path) for name, path in bundles.items()}
    _check_alike(opened)
    say = progress or opt.silent
    with staging(Path(output), marker=PACKAGE_FILE, force=force) as stage:
        told = {}
        for name in sorted(opened, key=lambda x: _weights(opened[x]), reverse=True):
            say(f"{name}: {opened[name].directory}")
            told[name] = _add(name, opened[name], stage, link=link)
        first = next(iter(opened.values())).manifest
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "layout": "portable",
            "package_name": Path(first.base["name_or_path"]).name or first.base["model_type"],
            "components": {
                part: {"variants": {name: told[name][part] for name in opened}}
                for part in first.parts
            },
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (stage / PACKAGE_FILE).write_text(text, encoding="utf-8")
        load_package(stage).check()
    return load_package(output)


def _provider(name: str) -> str:
    found = provider(name)
    if found is None:
        raise OptionError(
            f"there is no execution provider {name!r}",
            f"Providers are {', '.join(x.name for x in PROVIDERS)}.",
        )
    return found.name


def _check_alike(bundles: Mapping[str, Bundle]) -> None:
    if not bundles:
        raise OptionError(
            "no bundle was given", "Give at least one: lora-edge package BUNDLE -o DIR"
        )
    (first, one), *others = bundles.items()
    for name, other in others:
        for what, a, b in (
            ("base", one.manifest.base["fingerprint"], other.manifest.base["fingerprint"]),
            ("task", one.manifest.task, other.manifest.task),
        ):
            if a != b:
                raise OptionError(
                    f"the bundles of {first} and {name} are of unlike {what}s: {a} and {b}",
                    "Make a package of each.",
                )


def _beginning_with(stage: Path, entries: Mapping[str, FileEntry]) -> str | None:
    """The asset whose files are of these names and begin with these files."""
    for folder in (stage / SHARED_FOLDER).glob("*"):
        if {x.relative_to(folder).as_posix() for x in folder.rglob("*")} == set(entries) and all(
            hash_file(folder / path, entry.bytes) == entry.sha256 for path, entry in entries.items()
        ):
            return folder.name.replace("-", ":")
    return None


def _weights(bundle: Bundle) -> int:
    """Bytes of a bundle's weights."""
    files = bundle.manifest.files.items()
    return sum(x.bytes for path, x in files if (asset_of(path) or ("",))[0] == GRAPHS)


def _add(name: str, bundle: Bundle, stage: Path, *, link: bool) -> dict[str, Any]:
    """Put a bundle's files in place; what the manifest says of it, by part."""
    manifest = bundle.manifest
    shared: dict[str, dict[str, str]] = {}
    for relative in manifest.files:
        found = asset_of(relative)
        if found is None:
            place(bundle.verify(relative), stage / name / relative, link=link)
        else:
            shared.setdefault(found[0], {})[found[1]] = relative
    assets = {}
    for folder, files in shared.items():
        entries = {path: manifest.files[relative] for path, relative in files.items()}
        there = _beginning_with(stage, entries) if folder == GRAPHS else None
        assets[folder] = there or content_uri((path, x.sha256) for path, x in entries.items())
        target = asset_folder(stage, assets[folder])
        if not target.exists():  # else another bundle's: the same to the bit
            for path, relative in files.items():
                place(bundle.verify(relative), target / path, link=link)
    text = manifest.to_json()
    (stage / name / MANIFEST_NAME).write_text(text, encoding="utf-8")
    adapters = adapter_uris(manifest, assets)
    info = VariantInfo(hash_file(stage / name / MANIFEST_NAME), assets, adapters)
    return {part: variant_body(name, facts, info) for part, facts in manifest.parts.items()}
