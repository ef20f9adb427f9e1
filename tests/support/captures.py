"""Captured graphs as an export would write them, without adapters."""

from __future__ import annotations

from pathlib import Path

from lora_edge.base.checkpoint import resolve_base
from lora_edge.capture import BaseGraph, capture
from lora_edge.graph import check, fuse, load, save_graph


def captured(directory: Path, form: str, folder: Path) -> BaseGraph:
    """The graph of a checkpoint, its nodes fused in the fused form."""
    folder.mkdir()
    graph = capture(resolve_base(directory), folder, form=form)  # type: ignore[arg-type]
    if form == "fused":
        model = load(graph.path())
        fuse(model)
        save_graph(model, graph.path())
    check(graph.path())
    return graph
