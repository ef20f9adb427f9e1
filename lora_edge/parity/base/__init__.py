"""The base check: a captured graph, without adapters, against eager PyTorch."""

from __future__ import annotations

from typing import Any

from lora_edge.base.checkpoint import Base
from lora_edge.parity.base.decoder import Captured, check_decoder
from lora_edge.parity.base.encoder import check_encoder
from lora_edge.parity.base.seq2seq import check_seq2seq
from lora_edge.tasks.task import Task


def check_base(graph: Captured[Any], base: Base, task: Task) -> dict[str, Any]:
    """Compare captured graphs with eager PyTorch in float32.

    Args:
        graph: the capture.
        base: the model that it was captured from.
        task: what it was captured for.

    Returns:
        JSON-ready figures: floor, limit, each case's errors, and what was covered of the window.

    Raises:
        CaptureError: a case is beyond its limit, or proves nothing; names the case.
    """
    if task.causal:
        return check_decoder(graph, base)
    return (check_seq2seq if task.seq2seq else check_encoder)(graph, base, task)
