"""The graph with fixed shapes that an export writes beside the portable one, on the same data.

Knows parts and passes; knows nothing of runtimes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lora_edge.bundle.adapter_files import check_rank, largest_rank
from lora_edge.bundle.bundle import STATIC_GRAPH_FILE
from lora_edge.bundle.part import Part, StaticGraph
from lora_edge.errors import OptionError, UnsupportedModelError
from lora_edge.exporting.graphs import Progress
from lora_edge.exporting.options import Options, Shapes
from lora_edge.maths.lora import SiteChange

SEQ, PAST, RANK = 16, 496, 16
"""Tokens of a run, positions of the cache, and the rank where there is no adapter."""


def check_static(options: Options) -> None:
    """Check that a graph with fixed shapes can be written.

    Raises:
        UnsupportedModelError: of this task, backend or precision there is none.
        OptionError: a rank is asked for of a merged bundle, which has none.
    """
    if options.shapes is None:
        return
    if options.task.parts != ("decoder",):
        raise UnsupportedModelError(
            f"graphs with fixed shapes are written of text generators, got {options.task.name}",
            "Leave --static out, and targets that take fixed shapes only.",
        )
    if options.rounding is not None:
        raise UnsupportedModelError(
            f"graphs with fixed shapes are written in fp32, got --precision {options.precision}",
            "Use --precision fp32; the provider computes in what it computes in.",
        )
    if options.mode == "merged" and options.shapes.rank is not None:
        raise OptionError(
            f"--rank is {options.shapes.rank}, and a merged bundle has no ranks",
            "Leave --rank out, or use --mode switchable.",
        )


def with_static(
    stage: Path,
    part: Part,
    options: Options,
    given: Mapping[str, Mapping[str, SiteChange]],
    say: Progress,
) -> Part:
    """Write the graph with fixed shapes of a decoder; the part, which names it.

    Args:
        stage: where the bundle is made; its portable graph is there.
        part: the decoder.
        options: what was asked for.
        given: adapter -> what it changes.
        say: called with a line.

    Raises:
        OptionError: more positions than the model has.
        AdapterError: an adapter has a larger rank than was asked for.
        GraphError: the model has no graph with fixed shapes.
    """
    from lora_edge import graph as passes

    assert options.shapes is not None
    static = _sizes(options.shapes, part, given)
    for name, changes in given.items():
        check_rank(name, changes, static)
    say(f"writing a graph with {static.line()}")
    model = passes.load(stage / part.file)
    passes.fix_shapes(model, static.seq, static.past, static.rank)
    passes.save_graph(model, stage / static.file)
    passes.check(stage / static.file)
    return dataclasses.replace(part, static=static)


def _sizes(asked: Shapes, part: Part, given: Mapping[str, Mapping[str, SiteChange]]) -> StaticGraph:
    longest = part.max_length or SEQ + PAST
    seq = asked.seq or min(SEQ, max(1, longest // 2))
    past = asked.past or max(1, min(PAST, longest - seq))
    if part.max_length and seq + past > part.max_length:
        raise OptionError(
            f"{seq} tokens behind {past} positions are {seq + past}, and the model has "
            f"{part.max_length} positions",
            f"Use --seq and --past that are {part.max_length} together, or less.",
        )
    rank = asked.rank or largest_rank(given.values()) or RANK
    return StaticGraph(STATIC_GRAPH_FILE, seq, past, rank if part.sites else 0)
