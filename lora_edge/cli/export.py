"""``lora-edge export``: a base and adapters -> a bundle."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from lora_edge.cli import options
from lora_edge.cli.arguments import conversion_rank, named_paths
from lora_edge.tasks.task import TASKS


@options.command()
@click.argument("base")
@options.adapters(
    "A PEFT directory, a hub id or a folder of MLX-LM, and what to call it; `lora-edge inspect "
    "DIR` says what it carries and which mode takes it."
)
@options.path("-o", "--output", required=True, help="The bundle's folder.")
@options.choice(
    "--mode",
    ["switchable", "merged"],
    "Adapters as inputs of one graph, or one adapter merged into the weights. Activated LoRAs "
    "are switchable only, experts (target_parameters) merged only.",
)
@click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    help="What the model is to do.  [default: what the adapters were trained for, or the base is]",
)
@click.option(
    "--form",
    type=click.Choice(["fused", "portable"]),
    help="Fast operators of ONNX Runtime, or standard ONNX operators only.  "
    "[default: what --target takes, else fused]",
)
@click.option(
    "--target",
    "targets",
    metavar="NAME[,NAME…]",
    default="",
    help="Where the bundle is to run, as `lora-edge targets` names the places. Chooses --form, and "
    "--static where one takes fixed shapes only; refuses what one of them does not take.",
)
@click.option(
    "--static",
    is_flag=True,
    help="Write a graph with fixed shapes too, for NPUs: of a text generator in the portable form "
    "and fp32, on the same weights and adapters. One row, --seq tokens behind --past positions.",
)
@click.option(
    "--seq", type=click.IntRange(1), help="With --static: tokens of one run.  [default: 16]"
)
@click.option(
    "--past", type=click.IntRange(1), help="With --static: positions of the cache.  [default: 496]"
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    help="With --static: rank of the adapters, lower ones are padded.  [default: the largest of "
    "the adapters]",
)
@options.choice(
    "--backend",
    ["trace", "optimum"],
    "What makes the base graph; optimum needs lora-edge[optimum] and ignores --form.",
)
@options.choice(
    "--sites",
    ["all", "adapters"],
    "Branches on all linear layers of the decoder, or only where the adapters need them.",
)
@click.option(
    "--kinds",
    default="lora",
    show_default=True,
    help="Comma-separated: kinds of adapters to come that the graph takes on any layer: lora, "
    "dora, bias, norm, embedding, conv. What the given adapters need is added in any case.",
)
@click.option(
    "--convert",
    metavar="RANK",
    callback=lambda _context, _parameter, text: conversion_rank(text),
    help="Approximate adapters of other PEFT types (LoHa, LoKr, VeRA, MiSS ...) by LoRAs of this "
    "rank, or of the ranks that keep this share (0 to 1) of each delta's energy, and say how far "
    "off they are.",
)
@options.choice(
    "--precision",
    ["fp32", "fp16", "int8", "int4"],
    "fp16: weights, activations and cache, for providers that compute in it. int8 and int4: the "
    "linear layers' weights, but for mixtures' experts; not in the portable form; heads of labels "
    "and adapters stay in fp32; of the layers that a merged one changes, see --keep-high. fp16 "
    "is not for encoder-decoders.",
)
@options.choice(
    "--head-precision",
    ["int8", "int4", "fp32"],
    "Of a text generator's output layer, and of the token embedding, where --precision is int8 or "
    "int4.",
)
@click.option(
    "--block-size",
    type=click.Choice(["16", "32", "64", "128"]),
    default="32",
    show_default=True,
    help="Weights of few bits: inputs that share a scale. Larger is smaller and less exact.",
)
@click.option(
    "--symmetric", is_flag=True, help="Weights of few bits: no zero points (with rtn only)."
)
@click.option(
    "--per-channel",
    is_flag=True,
    help="Encoders in int8: one scale for each output and each tensor of activations (dynamic "
    "quantization). Faster and less exact.",
)
@options.choice(
    "--algorithm",
    ["rtn", "k-quant"],
    "How weights of few bits are rounded: to the nearest code, or with scales searched for the "
    "least error.",
)
@options.choice(
    "--activations",
    ["int8", "fp32"],
    "What the layers of int8 and int4 multiply their codes with. With int8, which is faster, the "
    "graph in floats is written too, on the same data: it is what is proved.",
)
@click.option(
    "--keep-high",
    type=click.Choice(["touched", "none", "auto"]),
    help="Merged and of few bits: which layers that the adapter changes are not rounded to "
    "--precision. All (touched), none, or as few as --min-effect needs (auto): first to 8 bits, "
    "then in fp32.  [default: touched]",
)
@click.option(
    "--min-effect",
    type=float,
    help="With --keep-high none or auto: the least share of the adapter's effect on logits that "
    "may be left; with less, nothing is published.  [default: 0.9]",
)
@click.option(
    "--low-memory",
    is_flag=True,
    help="Prove a large base in float32 in parts, without a copy of its weights, which takes "
    "longer; and a very large one in few bits on fewer prompts, which the report says.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def command(adapters: tuple[str, ...], output: Path, **given: Any) -> None:
    """Export BASE (a Hugging Face folder or hub id) and PEFT adapters to one ONNX bundle.

    The bundle is published only if every adapter does in it what it does in PyTorch. What cannot be
    exported exactly is refused by name, and nothing is written. An adapter that replaces a whole
    matrix (modules_to_save) costs that matrix in a switchable bundle; the export says how much.
    """
    from lora_edge.exporting.export import export

    started = time.monotonic()
    base = given.pop("base")
    for name in ("kinds", "targets"):
        given[name] = [word.strip() for word in given[name].split(",") if word.strip()]
    given["block_size"] = int(given["block_size"])
    bundle = export(
        base,
        named_paths(adapters),
        output=output,
        progress=lambda line: click.echo(line, err=True),
        **given,
    )
    written = sum(entry.bytes for entry in bundle.manifest.files.values())
    click.echo(
        f"exported in {time.monotonic() - started:.1f} s, {_peak_memory()}, "
        f"{written:,} bytes written",
        err=True,
    )
    click.echo(bundle.directory)


def _peak_memory() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "peak memory unknown"
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mebibytes = peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return f"peak memory {mebibytes:.0f} MiB"
