"""The attention functions that replace a model's own while it is traced, and the cache they use.

transformers calls a registered attention function once per layer with the layer's query, key and
value, so one function is all that it takes to turn any decoder into a graph with a KV cache.
Knows nothing of exporters or files.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_edge.capture.operators import GroupQueryAttention, LayerFacts, Reshape
from lora_edge.errors import CaptureError, UnsupportedModelError

MASKED = -3e4
"""Added to the score of a key that a query may not see; ``exp`` of it is zero in fp32 and fp16."""

# Arguments that models pass on to the attention function and that do not change its result.
_NEUTRAL = frozenset(
    {
        "cache_position",
        "deterministic",  # of a kernel that is not used
        "dropout",
        "layer_idx",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True)
class RotaryUse:
    """A query and key before rotation, and the tables that rotate them."""

    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool


class Attention(Protocol):
    """One way to compute attention over a past; lives for one forward pass."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the model's ``cache.update`` returns for new keys and values of a layer."""

    def attend(
        self, layer: int, facts: LayerFacts, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """``[batch, heads, seq, head_dim]`` -> ``[batch, seq, heads, head_dim]``."""


class Survey:
    """Computes nothing; shows what every layer asks for."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key, value

    def attend(
        self, layer: int, facts: LayerFacts, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        return query.transpose(1, 2)


class Fused:
    """One GroupQueryAttention per layer, which holds the cache and, where possible, the rotary."""

    def __init__(
        self, past: list[tuple[Tensor, Tensor]], attention_mask: Tensor, rotary: RotarySource
    ) -> None:
        self.presents: dict[int, tuple[Tensor, Tensor]] = {}
        self._past = past
        self._rotary = rotary
        self._lengths = (attention_mask.sum(1) - 1).to(torch.int32)
        width: Any = attention_mask.shape[1]  # a tensor while tracing
        self._total = torch.as_tensor(width).to(torch.int32)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key, value

    def attend(
        self, layer: int, facts: LayerFacts, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        use = self._rotary.use(query, key)
        if use is not None:
            query, key = use.query, use.key
        out, present_key, present_value = GroupQueryAttention.apply(
            *(Reshape.apply(x.transpose(1, 2), (0, 0, -1)) for x in (query, key, value)),
            *self._past[layer],
            self._lengths,
            self._total,
            use.cos if use else None,
            use.sin if use else None,
            facts,
            bool(use and use.interleaved),
        )
        self.presents[layer] = (present_key, present_value)
        return Reshape.apply(out, (0, 0, facts.heads, -1))


class Portable:
    """Standard operators, explicit concatenation of the cache, one additive mask per window.

    The mask is made from the positions: a key is visible when it is real and
    ``0 <= position - key position < window``, where ``key position = cumsum(attention_mask) - 1``;
    right for padding on either side.
    """

    def __init__(
        self,
        past: list[tuple[Tensor, Tensor]],
        attention_mask: Tensor,
        position_ids: Tensor,
        windows: frozenset[int],
    ) -> None:
        self.presents: dict[int, tuple[Tensor, Tensor]] = {}
        self._past = past
        key_positions = attention_mask.cumsum(1) - 1
        distance = position_ids[:, None, :, None] - key_positions[:, None, None, :]
        causal = (distance >= 0) & (attention_mask[:, None, None, :] > 0)
        self._masks = {
            window: torch.where(causal & (distance < window) if window else causal, 0.0, MASKED)
            for window in sorted(windows)
        }

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        past_key, past_value = self._past[layer]
        both = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        self.presents[layer] = both
        return both

    def attend(
        self, layer: int, facts: LayerFacts, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        return explicit_attention(facts, self._masks[facts.window], query, key, value)


def explicit_attention(
    facts: LayerFacts, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attention in standard operators.

    Args:
        facts: of the layer.
        mask: ``[batch, 1, seq, total]``, added to the scores; ``None`` where every key is seen.
        query: ``[batch, heads, seq, head_dim]``; ``key``, ``value``:
            ``[batch, kv_heads, total, head_dim]``.

    Returns:
        ``[batch, seq, heads, head_dim]``.
    """
    groups = facts.heads // facts.kv_heads
    query = query * facts.scale
    if groups > 1:  # one more axis broadcasts each key/value head over its queries, no copy
        query = Reshape.apply(query, (0, facts.kv_heads, groups, -1, facts.head_dim))
        key, value = key.unsqueeze(2), value.unsqueeze(2)
        mask = None if mask is None else mask.unsqueeze(1)
    scores = torch.matmul(query, key.transpose(-1, -2))
    if facts.softcap:
        scores = torch.tanh(scores / facts.softcap) * facts.softcap
    out = torch.matmul(torch.softmax(scores if mask is None else scores + mask, -1), value)
    if groups > 1:
        out = Reshape.apply(out, (0, facts.heads, -1, facts.head_dim))
    return out.transpose(1, 2)


class RotarySource(Protocol):
    """Knows which tensors a model's rotary function returned."""

    def use(self, query: Tensor, key: Tensor) -> RotaryUse | None:
        """How to rotate inside attention, or ``None`` when these are not rotary's very results."""


@dataclass(frozen=True)
class Call:
    """A call of the attention function by a layer of the model.

    Attributes:
        module: the layer's attention.
        facts: what it asks for.
        states: query, key and value.
        mask: one that the model made; None: it made none.
        is_causal: what the model said in the call; None: nothing.
    """

    module: torch.nn.Module
    facts: LayerFacts
    states: tuple[Tensor, Tensor, Tensor]
    mask: Tensor | None
    is_causal: bool | None


class RegisteredAttention(ABC):
    """A function that transformers calls instead of the model's attention, while it is registered.

    It computes ``[batch, heads, seq, head_dim]`` queries, keys and values to
    ``([batch, seq, heads, head_dim], None)``.
    """

    calls: int
    """How often the function ran in this pass."""

    def __init__(self, model_type: str) -> None:
        self.calls = 0
        self.name = f"lora_edge_{uuid.uuid4().hex[:12]}"
        self._model_type = model_type

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Make the function known to transformers under ``self.name``, for the block only."""
        # No mask function of this name exists, so transformers makes no mask at all.
        ALL_ATTENTION_FUNCTIONS[self.name] = self
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[self.name]

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls it; the second value stands for the weights, which nobody reads."""
        facts = self._facts(query, key, value, scaling, sliding_window, softcap, others)
        self.calls += 1
        states = query, key, value
        return self._attend(Call(module, facts, states, attention_mask, is_causal)), None

    @abstractmethod
    def _attend(self, call: Call) -> Tensor:
        """``[batch, seq, heads, head_dim]``; refuses what it cannot compute."""

    def _facts(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        others: Mapping[str, Any],
    ) -> LayerFacts:
        """What a call asks for; refuses ``others``, unless they are known to change nothing."""
        unknown = sorted(k for k, v in others.items() if v is not None and k not in _NEUTRAL)
        if unknown:
            self._refuse(f"its attention takes {', '.join(unknown)}, which would be ignored")
        if key.shape[3] != value.shape[3] or key.shape[3] != query.shape[3]:
            self._refuse("its value heads differ in size from its key heads")
        return LayerFacts(
            heads=int(query.shape[1]),
            kv_heads=int(key.shape[1]),
            head_dim=int(query.shape[3]),
            scale=float(int(query.shape[3]) ** -0.5 if scaling is None else scaling),
            window=int(window or 0),
            softcap=float(softcap or 0.0),
        )

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{self._model_type} models are not supported: {reason}",
            "Use --backend optimum, or a model of a supported family.",
        )


class AttentionSwap(RegisteredAttention):
    """The attention of a decoder with a cache.

    Counts its calls: a layer that computes its attention elsewhere would otherwise be traced with
    its own, which ignores the cache.
    """

    def __init__(self, model_type: str) -> None:
        super().__init__(model_type)
        self.attention: Attention = Survey()
        self.facts: dict[int, LayerFacts] = {}
        self._layers: list[int] = []

    def begin(self, attention: Attention) -> None:
        """Start a forward pass."""
        self.attention = attention
        self._layers = []
        self.calls = 0

    def check_calls(self, layers: int) -> None:
        """Check that the pass that just ended called the function once for each layer.

        Raises:
            CaptureError: it did not.
        """
        if sorted(self._layers) != list(range(layers)):
            raise CaptureError(
                f"{self._model_type}: the attention function ran for layers {self._layers}, not "
                f"once for each of 0 to {layers - 1}",
                "This architecture computes attention in its own way; try --backend optimum.",
            )

    def _attend(self, call: Call) -> Tensor:
        layer = getattr(call.module, "layer_idx", None)
        if not isinstance(layer, int):
            self._refuse(f"{type(call.module).__name__} has no layer_idx")
        if call.is_causal is False or getattr(call.module, "is_causal", True) is False:
            self._refuse(f"{type(call.module).__name__} attends in both directions")
        self._layers.append(layer)
        if isinstance(self.attention, Survey):
            self.facts[layer] = call.facts
        return self.attention.attend(layer, self.facts[layer], *call.states)


class TraceCache(Cache):
    """The cache that the traced model sees: empty as far as it can tell, so it makes no mask."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(layers=[])
        self._attention = attention

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._attention.update(layer_idx, key_states, value_states)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0
