"""``lora-edge targets``: where bundles run, what each place takes, and what runs here."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from lora_edge.cli import options
from lora_edge.cli.here import Here, here
from lora_edge.targets.table import TARGETS, target
from lora_edge.targets.target import Target

_COLUMNS = 80
_YES_OR_NO = {
    "dynamic_shapes": ("takes graphs with dynamic shapes", "takes graphs with fixed shapes only"),
    "zero_size": (
        "takes tensors with a zero-size dimension",
        "takes no tensors with a zero-size dimension: no adapter is zeros of rank 1",
    ),
    "runtime_weights": (
        "multiplies by weights that are inputs, as those of adapters are",
        "multiplies by constant weights only: --mode merged leaves less to the CPU",
    ),
    "adapter_api": (
        "has a call that loads .onnx_adapter files",
        "has no call that loads .onnx_adapter files",
    ),
    "io_binding": ("reads and writes tensors where they are", "copies tensors in and out"),
    "mixed_rows": (
        "takes batches whose rows have different adapters",
        "takes batches with the same adapter on each row only",
    ),
}
_LISTED = {
    "packages": ("what brings it", "It comes with"),
    "device": ("how its device is found", "Its device is"),
    "forms": ("which form of a text generator it takes", "Of a text generator it takes"),
    "dtypes": ("which floats it computes in", "It was seen to compute in"),
    "quantization": ("which weights of few bits it takes", "Weights of few bits may be written as"),
}


@options.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """Show where bundles run, and what this machine can run.

    With NAME, everything that is known of that target. The targets are execution providers of ONNX
    Runtime, for `run --provider`, and clients that read bundles.
    """
    if name is None:
        found = [(each, here(each)) for each in TARGETS]
        facts: Any = [_facts(*pair) for pair in found]
        lines = _table(found)
    else:
        one = target(name)
        reached = here(one)
        facts = _facts(one, reached)
        lines = _told(one, reached)
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(lines))


def _facts(known: Target, reached: Here) -> dict[str, Any]:
    packages = [package._asdict() for package in known.packages]
    made = {"packages": packages, "defaults": dict(known.defaults), "here": reached._asdict()}
    return known._asdict() | made


def _table(found: list[tuple[Target, Here]]) -> Iterator[str]:
    width = max(len(known.name) for known, _ in found)
    for known, reached in found:
        yield f"{known.name:<{width}}  {'yes' if reached.runs else 'no ':<3}  {known.runs}"
        if not reached.runs:
            yield from _wrapped(reached.reason, " " * (width + 7))
            yield f"{'':<{width + 7}}→ {reached.way}"


def _told(known: Target, reached: Here) -> Iterator[str]:
    yield from _wrapped(f"{known.name}: {known.runs}.")
    if known.ort_name:
        yield from _wrapped(f"ONNX Runtime calls it {known.ort_name}.")
    if reached.runs:
        yield "It runs on this machine."
    else:
        yield from _wrapped(f"It does not run on this machine: {reached.reason}.")
        yield f"→ {reached.way}"
    yield ""
    unknown = []
    for words, text in _sentences(known):
        if text is None:
            unknown.append(words)
        else:
            yield from _wrapped(text)
    for note in known.notes:
        yield from _wrapped(note)
    yield from _wrapped(f"Seen: {known.seen}." if known.seen else "It was not run yet.")
    if unknown:
        yield ""
        yield from _wrapped(f"Not known: {'; '.join(unknown)}.")


def _sentences(known: Target) -> Iterator[tuple[str, str | None]]:
    """What each field is about, and the sentence that tells it; ``None``: it is not known."""
    listed: dict[str, Any] = {
        "forms": known.forms and " or ".join(f"--form {form}" for form in known.forms),
        "dtypes": known.dtypes and ", ".join(known.dtypes),
        "quantization": known.quantization and ", ".join(known.quantization),
        "packages": known.packages and ", or ".join(_package(known)),
        "device": known.device,
    }
    for field, (words, begins) in _LISTED.items():
        told = listed[field]
        yield words, told and f"{begins} {told}."
    for field, (yes, no) in _YES_OR_NO.items():
        value = getattr(known, field)
        yield f"whether it {yes}", None if value is None else f"It {yes if value else no}."
    if known.tasks:
        yield "", f"It runs {', '.join(known.tasks)} only."
    if known.memory != "cpu":
        yield "", f"lora-edge places tensors in the memory that ONNX Runtime calls {known.memory}."
    if known.defaults:
        given = ", ".join(f"{key}={value}" for key, value in known.defaults)
        yield "", f"lora-edge sets its options {given}, unless they are given."
    if known.options:
        yield "", f"Some of its options: {', '.join(known.options)}."


def _package(known: Target) -> Iterator[str]:
    for package in known.packages:
        beside = ", beside a wheel of ONNX Runtime" if package.beside else ""
        yield f"{package.name} ({package.installer}{beside})"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
