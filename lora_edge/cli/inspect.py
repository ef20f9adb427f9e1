"""``lora-edge inspect``: what an adapter or a bundle holds."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_edge.bundle.bundle import load_bundle
from lora_edge.bundle.manifest import MANIFEST_NAME, AdapterEntry, Manifest, aspect_names
from lora_edge.cli import options
from lora_edge.errors import LoraEdgeError
from lora_edge.files.hub import is_hub_id
from lora_edge.tasks.task import TASKS

if TYPE_CHECKING:
    from lora_edge.fit.inspect import Inspection, ModuleFacts

_COLUMNS = 80
_COMPARED = {
    "model": "Compared with the model that transformers builds, as the export does.",
    "names": "Compared with the names and shapes of the checkpoint's tensors, because the model "
    "could not be built here for this task; transformers may call them otherwise, and the export "
    "compares with the model itself.",
}


@options.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--base",
    help="With an adapter: compare it with this base: whether every layer exists there in its "
    "shape, and how much of its weight it changes.",
)
@click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    help="With --base: the task, as export takes it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: Path, base: str | None, task: str | None, as_json: bool) -> None:
    """Show what PATH, a PEFT directory or a bundle, holds.

    Of an adapter: what each module carries, and whether each mode of export can take it, with the
    reason and the way out where not. Needs no PyTorch, but for --base to compare with the model
    that transformers builds, as the export does; else with the names in the checkpoint.
    """
    if task is not None and base is None:
        raise click.UsageError("--task tells what the base is to do: give --base too.")
    if (path / MANIFEST_NAME).is_file():
        manifest = load_bundle(path).manifest
        size = sum(entry.bytes for entry in manifest.files.values())
        facts: dict[str, Any] = json.loads(manifest.to_json()) | {"bytes": size}
        lines = _bundle(path, manifest, size)
    elif path.exists() or is_hub_id(path):
        from lora_edge.base.checkpoint import resolve_base
        from lora_edge.fit.inspect import inspect_adapter

        found = inspect_adapter(path, resolve_base(base) if base is not None else None, task)
        facts = _facts(found)
        lines = _adapter(found)
    else:
        raise LoraEdgeError(f"{path} does not exist", "Give a PEFT directory or a bundle.")
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(lines))


def _facts(found: Inspection) -> dict[str, Any]:
    modes = {mode: [x._asdict() for x in refusals] for mode, refusals in found.modes.items()}
    return dataclasses.asdict(found) | {"modes": modes}


def _bundle(path: Path, manifest: Manifest, size: int) -> Iterator[str]:
    base = manifest.base
    form = manifest.gives.form
    yield from _entry("bundle", f"{path}: {manifest.mode}, {form} form, {manifest.precision}")
    yield from _entry(
        "base",
        f"{base['name_or_path']} ({base['model_type']}), fingerprint {base['fingerprint'][:12]}",
    )
    yield from _entry(
        "size", f"{size:,} bytes in {len(manifest.files)} files, {len(manifest.sites)} sites"
    )
    made = manifest.quantization
    if made is not None and made.half:
        yield from _entry(
            "float16",
            "weights of two dimensions and more, adapter inputs, cache and activations: "
            f"‖W − Q(W)‖/‖W‖ {made.mean_error:.2e} in the mean, {made.worst_error:.2e} at worst",
        )
    elif made is not None:
        high = () if manifest.survival is None else manifest.survival.high
        own = {path: bits for path, bits in made.bits_of.items() if path not in high}
        others = "".join(f", {path} to {bits}" for path, bits in own.items())
        how = f"{made.algorithm}{', symmetric' if made.symmetric else ''}"
        int8 = any(part.exact for part in manifest.parts.values())
        channels = f"{len(made.by_channel)} of them to 7, one scale for each output; "
        channels = channels if made.by_channel else ""
        yield from _entry(
            "quantized",
            f"{len(made.layers)} layers to {made.bits} bits{others}, {channels}in blocks of "
            f"{made.block_size} ({how}), activations in {'int8' if int8 else 'floats'}: "
            f"‖W − Q(W)‖/‖W‖ {made.mean_error:.2e} in the mean, {made.worst_error:.2e} at worst",
        )
    if manifest.survival is not None:
        kept = manifest.survival
        how = "" if manifest.half else f"; --keep-high {kept.keep_high}"
        yield from _entry("survival", f"{kept.line()}{how}")
    for part in manifest.parts.values():
        if part.static is not None:
            yield from _entry("static", part.static.line())
    if manifest.mode == "switchable":
        yield from _entry("kinds", f"takes adapters of {', '.join(manifest.kinds) or 'no kind'}")
    yield "adapters"
    for name, entry in sorted(manifest.adapters.items()):
        held = manifest.files[entry.file].bytes if entry.file else 0
        yield from _bundled(name, entry, held)


def _bundled(name: str, entry: AdapterEntry, held: int) -> Iterator[str]:
    ranks = entry.ranks.values()
    span = f"rank {_span(ranks)} on " if ranks else ""
    proved = "proved" if entry.proved else "UNPROVED"
    yield from _wrapped(
        f"{name}: {entry.kind}, {span}{len(entry.ranks)} sites, {held:,} bytes, {proved}", "  "
    )
    if entry.alone:
        yield from _wrapped(f"cannot be blended: {entry.alone}", "    ")
    if entry.invocation:
        yield from _wrapped(f"activated by the tokens {_listed(entry.invocation)}", "    ")
    if entry.labels:
        yield from _wrapped(f"labels {', '.join(entry.labels)}", "    ")
    if entry.text:
        yield from _wrapped(f"has its own {aspect_names(entry.text)}", "    ")
    if entry.conversion is not None:
        yield from _wrapped(
            f"approximates a {entry.conversion.peft_type}: relative error of ΔW "
            f"{entry.conversion.mean_error:.2e} in the mean, "
            f"{entry.conversion.worst_error:.2e} at worst",
            "    ",
        )


def _adapter(found: Inspection) -> Iterator[str]:
    what = f"{found.path}: REFUSED" if found.refused else found.path
    yield from _entry("adapter", what)
    yield from _entry("kind", found.kind)
    yield from _entry("base", _base_line(found))
    for mode, refusals in found.modes.items():
        if not refusals:
            yield from _entry(mode, "yes")
        if refusals and mode == "merged" and refusals == found.modes["switchable"]:
            yield from _entry(mode, "no, for the same reasons")
            continue
        for index, refusal in enumerate(refusals):
            yield from _entry("" if index else mode, f"no: {refusal.message}")
            yield from _entry("", f"→ {refusal.hint}")
    if found.alone:
        yield from _entry("blends", f"no: {found.alone}")
    if found.invocation:
        yield from _entry("activated", f"by the tokens {_listed(found.invocation)}")
    if found.labels:
        yield from _entry("labels", ", ".join(found.labels))
    if found.text:
        names = aspect_names(found.text)
        yield from _entry("brings", f"{names}: carried where they differ from the base's")
    for warning in found.warnings:
        yield from _entry("warning", warning)
    yield from _modules(found)
    yield from _replaced(found)
    if found.base is not None:
        yield ""
        yield from _wrapped(_COMPARED[found.compared or "names"], "")


def _base_line(found: Inspection) -> str:
    name = found.base_model or "not recorded"
    return name if found.base is None else f"{name}; compared with {found.base}"


def _modules(found: Inspection) -> Iterator[str]:
    if not found.modules:
        return
    ranks = [module.rank for module in found.modules.values()]
    yield ""
    yield f"{len(ranks)} low-rank modules, rank {_span(ranks)}"
    norm = f"{'‖ΔW‖/‖W‖':>11}" if found.base is not None else ""
    kinds = [_carried(module) for module in found.modules.values()]
    width = max(map(len, kinds))
    rows = [
        f"{module.rank:>6}{module.alpha:>7g}{module.scaling:>9.4g}"
        f"{f'{_norm(module.relative_norm):>11}' if norm else ''}  {kind:<{width}}"
        for module, kind in zip(found.modules.values(), kinds, strict=True)
    ]
    fits = len(rows[0]) + 2 + max(map(len, found.modules)) <= _COLUMNS
    yield f"{'rank':>6}{'alpha':>7}{'scaling':>9}{norm}  {'kind':<{width}}  module".rstrip()
    for path, row in zip(found.modules, rows, strict=True):
        if fits:
            yield f"{row}  {path}"
        else:
            yield row.rstrip()
            yield f"      {path}"


def _carried(module: ModuleFacts) -> str:
    extras = " DoRA" * module.dora + " bias" * module.bias
    return module.kind + extras


def _replaced(found: Inspection) -> Iterator[str]:
    if found.saved:
        yield ""
        yield "saved parameters, which replace the base's"
        for path, saved in found.saved.items():
            norm = f", ‖ΔW‖/‖W‖ {saved.relative_norm:.2e}" if saved.relative_norm else ""
            head = ", task head" if saved.head else ""
            whole = len(saved.shape) > 1 and not saved.head
            cost = f", {saved.switchable_bytes:,} bytes if switchable" if whole else ""
            yield from _wrapped(f"{path} {_listed(saved.shape)}{head}{norm}{cost}", "  ")
    if found.tokens:
        yield ""
        yield "trained token rows, which replace the base's"
        for path, rows in found.tokens.items():
            reach = f"; they reach {rows.reaches}, which is tied to it" if rows.reaches else ""
            yield from _wrapped(
                f"{path}: {len(rows.indices)} rows of {rows.size}, tokens "
                f"{_listed(rows.indices)}{reach}",
                "  ",
            )
    if found.stacked:
        yield ""
        yield "factors of stacked parameters (experts), compared with the base at export"
        for path, factors in found.stacked.items():
            shapes = ", ".join(f"A {_listed(a)} B {_listed(b)}" for a, b in factors.pairs)
            scalings = ", ".join(f"{name} {x:.4g}" for name, x in factors.scalings.items())
            yield from _wrapped(f"{path}: {shapes}, scaling of {scalings}", "  ")
    if found.copies:
        yield ""
        yield "copies of the base's own parameters, which must be equal to them"
        words = {None: "not compared (give --base)", True: "equal", False: "DIFFERENT"}
        for path, copy in found.copies.items():
            yield from _wrapped(f"{path} {_listed(copy.shape)}: {words[copy.equal]}", "  ")


def _norm(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _span(ranks: Iterable[int]) -> str:
    ordered = sorted(ranks)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def _listed(numbers: Iterable[int]) -> str:
    return f"[{', '.join(str(number) for number in numbers)}]"


def _entry(label: str, text: str) -> Iterator[str]:
    return _wrapped(text, f"{label:<10} ", " " * 11)


def _wrapped(text: str, first: str, then: str | None = None) -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=f"{first}  " if then is None else then,
        break_long_words=False,
        break_on_hyphens=False,
    )
