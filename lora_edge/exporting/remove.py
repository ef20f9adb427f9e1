"""Removing adapters from a bundle. Needs no PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_edge import types as opt
from lora_edge.bundle.bundle import Bundle, load_bundle
from lora_edge.bundle.manifest import Manifest
from lora_edge.errors import BundleError, OptionError
from lora_edge.files.changing import preparing, recover
from lora_edge.files.json import read_object
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.around.golden import is_around
from lora_edge.parity.record.golden import is_report, load_golden, stem_of


def remove(
    bundle: str | os.PathLike[str] | Bundle,
    names: Sequence[str],
    *,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Remove adapters from a switchable bundle; its graph and weights are not touched.

    Golden cases in which they take part go too, those of blends and mixed batches included, and so
    does the bundle's own report, if it is about them. ``validate`` with the reference records those
    of the adapters that are left again.

    Args:
        bundle: the bundle or its folder.
        names: of the adapters.
        progress: called with a line about the golden cases that go.

    Returns:
        The bundle with its new manifest.

    Raises:
        AdapterNotFoundError: the bundle has no adapter of that name.
        OptionError: no name is given, or ``none``, which stands for the base.
        BundleError: the bundle is merged, damaged, or was replaced meanwhile.
    """
    opt.called("progress", progress)
    given = names if isinstance(names, (list, tuple)) else ()
    if not given or not all(isinstance(name, str) for name in given):
        raise OptionError(
            f"names is {names!r}, expected one or several names", "Give a list of names."
        )
    target = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    recover(target.directory)
    chosen = frozenset(given)
    gone: list[str] = []

    def edit(now: Manifest) -> Manifest:
        current = Bundle(target.directory, now)
        _refuse(current, chosen)
        gone[:] = [file for file in now.files if _is_about(current, file, chosen)]
        lost = tuple(f"adapters/{name}/" for name in chosen)
        files = {
            file: entry
            for file, entry in now.files.items()
            if file not in gone and not file.startswith(lost)
        }
        left = {name: entry for name, entry in now.adapters.items() if name not in chosen}
        return dataclasses.replace(now, adapters=left, files=files)

    _refuse(target, chosen)
    with preparing(target.directory) as stage:
        result = target.change(stage, edit)
    cases = [stem for file in gone if (stem := stem_of(file)) is not None]
    if cases and progress is not None:
        progress(f"golden cases that went along: {', '.join(sorted(cases))}")
        if set(result.manifest.adapters) - {NONE_ADAPTER}:
            progress("validate --reference records what is missing again")
    return result


def _refuse(bundle: Bundle, names: frozenset[str]) -> None:
    if NONE_ADAPTER in names:
        raise OptionError(
            f"{NONE_ADAPTER!r} is the base without an adapter, which every bundle has",
            "Name adapters only.",
        )
    for name in sorted(names):
        bundle.adapter(name)
    if bundle.manifest.mode != "switchable":
        raise BundleError(
            f"{bundle.directory} is a merged bundle: its adapter is in the weights",
            "Export the base again, without the adapter or with another.",
        )


def _is_about(bundle: Bundle, file: str, names: frozenset[str]) -> bool:
    path: Path = bundle.directory / file
    if stem_of(file) is not None:
        return bool(names & set(load_golden(path).probe.adapters))
    if is_around(file):
        text = path.read_text(encoding="utf-8")
        return any(json.dumps(name) in text for name in names)
    if is_report(file):
        hint = "Copy the bundle again, or export it again."
        return bool(names & set(read_object(path, BundleError, hint).get("adapters", ())))
    return False
