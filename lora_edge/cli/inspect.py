"""``lora-edge inspect``: what an adapter or a bundle holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lora_edge.bundle import MANIFEST_NAME
from lora_edge.errors import BaseModelError, LoraEdgeError


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--base", help="With an adapter: show ||ΔW|| / ||W|| of each module.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: Path, base: str | None, as_json: bool) -> None:
    """Show what PATH, a PEFT directory or a bundle, holds, and what would be refused."""
    if (path / MANIFEST_NAME).is_file():
        facts, text = _bundle(path)
    elif path.exists():
        facts, text = _adapter(path, base)
    else:
        raise LoraEdgeError(f"{path} does not exist", "Give a PEFT directory or a bundle.")
    click.echo(json.dumps(facts, indent=1) if as_json else text)


def _bundle(path: Path) -> tuple[dict[str, Any], str]:
    from lora_edge.bundle import load_bundle

    manifest = load_bundle(path).manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    facts: dict[str, Any] = json.loads(manifest.to_json()) | {"bytes": size}
    lines = [
        f"bundle   {path}: {manifest.mode}, {manifest.graph.form} form, {manifest.precision}",
        f"base     {manifest.base['name_or_path']} ({manifest.base['model_type']}), fingerprint "
        f"{manifest.base['fingerprint'][:12]}",
        f"size     {size:,} bytes in {len(manifest.files)} files, {len(manifest.sites)} sites",
        "adapters",
    ]
    for name, entry in sorted(manifest.adapters.items()):
        held = sum(file.bytes for key, file in manifest.files.items() if key == entry.file)
        ranks = (
            f"rank {min(entry.ranks.values())} to {max(entry.ranks.values())} on "
            if (entry.ranks)
            else ""
        )
        proved = "proved" if entry.proved else "UNPROVED"
        lines.append(
            f"  {name}: {entry.kind}, {ranks}{len(entry.ranks)} sites, {held:,} bytes, {proved}"
        )
        if entry.conversion is not None:
            lines.append(
                f"    approximates a {entry.conversion['peft_type']}: relative error of ΔW "
                f"{entry.conversion['mean_error']:.2e} in the mean, "
                f"{entry.conversion['worst_error']:.2e} at worst"
            )
    return facts, "\n".join(lines)


def _adapter(path: Path, base: str | None) -> tuple[dict[str, Any], str]:
    from lora_edge.adapter import load_adapter, refusals

    refused = refusals(path)
    if refused:
        facts: dict[str, Any] = {"path": str(path), "refused": refused}
        return facts, "\n".join([f"adapter  {path}: REFUSED", *(f"  {line}" for line in refused)])
    adapter = load_adapter(path, "adapter")
    strengths = _strengths(adapter, base) if base is not None else {}
    modules = {
        name: {
            "rank": module.rank,
            "alpha": module.alpha,
            "scaling": module.scaling,
            "in_features": module.in_features,
            "out_features": module.out_features,
            **({"relative_norm": strengths[name]} if name in strengths else {}),
        }
        for name, module in adapter.modules.items()
    }
    facts = {
        "path": str(path),
        "kind": adapter.kind,
        "base_model": adapter.base_model,
        "modules": modules,
        "warnings": list(adapter.warnings),
        "refused": [],
    }
    lines = [
        f"adapter  {path}: {adapter.kind}, {len(modules)} modules, base {adapter.base_model}",
        *(f"warning  {line}" for line in adapter.warnings),
    ]
    for name, module in adapter.modules.items():
        strength = f"  ‖ΔW‖/‖W‖ {strengths[name]:.2e}" if name in strengths else ""
        lines.append(f"  {name}  rank {module.rank}  scaling {module.scaling:g}{strength}")
    return facts, "\n".join(lines)


def _strengths(adapter: Any, base: str) -> dict[str, float]:
    """Frobenius norm of each delta relative to its weight's."""
    import numpy as np

    from lora_edge.base import resolve_base
    from lora_edge.lora import delta

    model = resolve_base(base)
    found = {}
    for name, module in adapter.modules.items():
        weight = model.parameter(f"{name}.weight")
        if weight is None:
            raise BaseModelError(
                f"{base} has no weight of its own for {name}",
                "Is this the adapter's base? A tied head has none; leave out --base.",
            )
        found[name] = float(np.linalg.norm(delta(module.factors())) / np.linalg.norm(weight))
    return found
