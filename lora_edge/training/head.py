"""The output head on target positions only, and the loss there.

Before the head runs, the hidden states of positions that predict a target are picked out:
``[batch, seq, hidden] -> [1, targets, hidden]``. Whatever a model does to its logits afterwards
(scaling, softcap) is elementwise in the architectures that allow this; :func:`agrees` finds out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lora_edge.training.tokens import IGNORED

_CLOSE = 1e-4  # relative; float32 sums in another order differ by about 1e-6, bfloat16 by 1e-3
_CLOSE_HALF = 2e-2


class TargetHead:
    """A hook on a model's output head."""

    def __init__(self, model: Any) -> None:
        """Hook into ``model.get_output_embeddings()``, of the model within PEFT's wrapper."""
        self._keep: torch.Tensor | None = None
        head = model.get_base_model().get_output_embeddings()
        self.usable = head is not None
        if head is not None:
            head.register_forward_pre_hook(self._pick)

    @contextlib.contextmanager
    def on(self, keep: torch.Tensor) -> Iterator[None]:
        """Run the head on the positions ``keep [batch, seq] bool`` only."""
        self._keep = keep
        try:
            yield
        finally:
            self._keep = None

    def _pick(self, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._keep is None or not inputs or inputs[0].shape[:2] != self._keep.shape:
            return None
        return (inputs[0][self._keep].unsqueeze(0), *inputs[1:])


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """Which positions predict a target: ``labels [batch, seq]`` -> ``[batch, seq] bool``."""
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != IGNORED
    return keep


def target_logits(
    model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor, head: TargetHead | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where a target is predicted, and the targets.

    Args:
        model: a causal language model, wrapped or not.
        inputs: its inputs, without labels.
        labels: ``[batch, seq] int64``.
        head: computes the head there only; ``None``: it is computed everywhere.

    Returns:
        ``[targets, vocab] float32`` and ``[targets] int64``, row by row.

    Raises:
        ValueError: the model did not give one row of logits for each target.
    """
    keep = predicting(labels)
    targets = labels[:, 1:][keep[:, :-1]]
    if head is None:
        logits = model(**inputs).logits[keep]
    else:
        with head.on(keep):
            logits = model(**inputs).logits[0]
    if logits.shape[0] != targets.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits for {targets.shape[0]} targets")
    return logits.float(), targets


def agrees(model: Any, batch: dict[str, torch.Tensor], head: TargetHead) -> bool:
    """Whether the loss with the head on targets only is the model's own loss on this batch."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            own = float(model(**batch).loss)
            logits, targets = target_logits(model, inputs, batch["labels"], head)
            ours = float(cross_entropy(logits, targets))
    except (ValueError, RuntimeError, IndexError, TypeError):
        return False  # an architecture whose head takes something else; the whole head is right
    finally:
        model.train(was)
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return abs(ours - own) <= (_CLOSE_HALF if half else _CLOSE) * max(1.0, abs(own))
