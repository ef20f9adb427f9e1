"""Operators that a trace emits as one node each.

Each operator is a ``torch.autograd.Function`` whose ``symbolic`` writes the node; ``forward`` only
has to give the right shapes, because a trace records shapes and order, never values. None of them
registers anything: nothing is left behind when a capture ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Reshape(torch.autograd.Function):
    """``Reshape`` to a constant shape; 0 copies the input's dimension, as in ONNX."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        # Not x.reshape: a capture replaces that method by this operator.
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
        return torch.reshape(x, sizes)

    @staticmethod
    def symbolic(g: Any, x: Any, shape: tuple[int, ...]) -> Any:
        if 0 in shape and -1 not in shape:  # the exporter's shape inference cannot do without
            shape = (*shape[:-1], -1)
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape)))


class Linear(torch.autograd.Function):
    """``x [..., in] @ w``, ``w [in, out]``, or ``[out, in]`` with ``transpose``; one MatMul."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transpose: bool) -> Tensor:
        return x.new_zeros(*x.shape[:-1], weight.shape[0 if transpose else 1])

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, transpose: bool) -> Any:
        if transpose:
            weight = g.op("Transpose", weight, perm_i=[1, 0])
        return g.op("MatMul", x, weight)


class BatchedMatMul(torch.autograd.Function):
    """``a @ b`` of stacked matrices, at least one of them a weight; one MatMul."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        stack = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return a.new_zeros(*stack, a.shape[-2], b.shape[-1])

    @staticmethod
    def symbolic(g: Any, a: Any, b: Any) -> Any:
        return g.op("MatMul", a, b)


class GatherRows(torch.autograd.Function):
    """``weight [n, ...]`` at ``index [T, k]`` -> ``[T, k, ...]``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Tensor:
        # Takes no memory: a token's experts may be gigabytes.
        return weight.new_zeros(1).expand(*index.shape, *weight.shape[1:])

    @staticmethod
    def symbolic(g: Any, weight: Any, index: Any) -> Any:
        return g.op("Gather", weight, index, axis_i=0)


class ReshapeLike(torch.autograd.Function):
    """``x`` in the shape of ``like``, whatever that is at run time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, like: Tensor) -> Tensor:
        return torch.reshape(x, like.shape)

    @staticmethod
    def symbolic(g: Any, x: Any, like: Any) -> Any:
        out = g.op("Reshape", x, g.op("Shape", like))
        out.setType(like.type())
        return out


class Choose(torch.autograd.Function):
    """``few`` where ``index`` has at most ``limit`` elements, else ``many``; equal in value.

    The node is not ONNX: :func:`lora_edge.capture.conditional.lower_choices` turns it into an
    ``If``
    whose branches hold all that only they need.
    """

    @staticmethod
    def forward(ctx: Any, few: Tensor, many: Tensor, index: Tensor, limit: int) -> Tensor:
        return many.clone()

    @staticmethod
    def symbolic(g: Any, few: Any, many: Any, index: Any, limit: int) -> Any:
        out = g.op("lora_edge::Choose", few, many, index, limit_i=limit)
        out.setType(many.type())
        return out


class LastPositions(torch.autograd.Function):
    """Positions of each row's last tokens -> ``[batch, kept] int64``.

    ``attention_mask [batch, total]``, padded on the right; ``input_ids [batch, seq]``; ``keep []``,
    how many; 0: every position, as it stands. A shorter row has its first position in the place of
    those that it lacks. In a run with a past, where rows have one token each or one row is alone,
    the last token is the last of the run.
    """

    @staticmethod
    def forward(ctx: Any, attention_mask: Tensor, input_ids: Tensor, keep: Tensor) -> Tensor:
        return input_ids.new_zeros(len(input_ids), int(keep))

    @staticmethod
    def symbolic(g: Any, attention_mask: Any, input_ids: Any, keep: Any) -> Any:
        def constant(value: Any) -> Any:
            return g.op("Constant", value_t=torch.tensor(value))

        width = g.op("Squeeze", g.op("Shape", input_ids, start_i=1, end_i=2), constant([0]))
        every = g.op("Equal", keep, constant(0))
        count = g.op("Where", every, width, g.op("Min", keep, width))
        back = g.op("Range", g.op("Neg", count), constant(0), constant(1))
        length = g.op("ReduceSum", attention_mask, constant([1]), keepdims_i=1)
        ends = g.op("Where", every, width, g.op("Min", length, width))
        return g.op("Max", g.op("Add", ends, back), constant(0))


class TakePositions(torch.autograd.Function):
    """``x [batch, seq, hidden]`` at ``positions [batch, kept]`` -> ``[batch, kept, hidden]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor) -> Tensor:
        return torch.take_along_dim(x, positions.unsqueeze(2), 1)

    @staticmethod
    def symbolic(g: Any, x: Any, positions: Any) -> Any:
        axes = g.op("Constant", value_t=torch.tensor([2]))
        return g.op("GatherND", x, g.op("Unsqueeze", positions, axes), batch_dims_i=1)


class RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x²) + eps) * w`` over the last axis, as ``SimplifiedLayerNormalization``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, eps: float) -> Any:
        out = g.op(
            "SimplifiedLayerNormalization", x, weight, axis_i=-1, epsilon_f=eps, stash_type_i=1
        )
        out.setType(x.type())
        return out


class Rotary(torch.autograd.Function):
    """``com.microsoft.RotaryEmbedding`` on ``x [batch, heads, seq, head_dim]``.

    ``cos``, ``sin``: ``[positions, rotary_dim / 2]`` tables; ``positions``: ``[batch, seq] int64``;
    ``rotary_dim`` is 0 where the whole head is rotated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        rotary_dim: int,
        interleaved: bool,
    ) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(
        g: Any,
        x: Any,
        positions: Any,
        cos: Any,
        sin: Any,
        heads: int,
        rotary_dim: int,
        interleaved: bool,
    ) -> Any:
        attributes = {"interleaved_i": int(interleaved)}
        if rotary_dim:
            attributes |= {"rotary_embedding_dim_i": rotary_dim, "num_heads_i": heads}
        out = g.op("com.microsoft::RotaryEmbedding", x, positions, cos, sin, **attributes)
        out.setType(x.type())
        return out


@dataclass(frozen=True)
class LayerFacts:
    """What a layer asks of attention.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key/value heads.
        head_dim: size of each head.
        scale: factor of the scores.
        window: how many keys a query sees, itself included; 0 is all of them.
        softcap: bound of the scores, 0 is none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float


class GroupQueryAttention(torch.autograd.Function):
    """``com.microsoft.GroupQueryAttention``: attention and KV cache in one operator.

    ``q [batch, seq, heads * head_dim]``, ``k``, ``v [batch, seq, kv_heads * head_dim]``,
    ``past_k``, ``past_v [batch, kv_heads, past, head_dim]``, ``lengths [batch] int32`` (valid keys
    of each row minus one), ``total [] int32`` (keys of the longest row), and ``cos``, ``sin`` (see
    :class:`Rotary`) where the operator itself rotates.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        lengths: Tensor,
        total: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        facts: LayerFacts,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, seq, _ = q.shape
        present = past_k.new_zeros(batch, facts.kv_heads, past_k.shape[2] + seq, past_k.shape[3])
        return q.clone(), present, present.clone()

    @staticmethod
    def symbolic(
        g: Any,
        q: Any,
        k: Any,
        v: Any,
        past_k: Any,
        past_v: Any,
        lengths: Any,
        total: Any,
        cos: Any,
        sin: Any,
        facts: LayerFacts,
        interleaved: bool,
    ) -> Any:
        inputs = [q, k, v, past_k, past_v, lengths, total]
        rotary = cos is not None and not _is_none(cos)
        if rotary:
            inputs += [cos, sin]
        outputs = g.op(
            "com.microsoft::GroupQueryAttention",
            *inputs,
            num_heads_i=facts.heads,
            kv_num_heads_i=facts.kv_heads,
            scale_f=facts.scale,
            local_window_size_i=facts.window or -1,
            softcap_f=facts.softcap,
            do_rotary_i=int(rotary),
            rotary_interleaved_i=int(rotary and interleaved),
            outputs=3,
        )
        for output, like in zip(outputs, (q, past_k, past_v), strict=True):
            output.setType(like.type())
        return outputs


def _is_none(value: Any) -> bool:
    return bool(value.node().mustBeNone())
