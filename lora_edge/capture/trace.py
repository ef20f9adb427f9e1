"""Hugging Face's own decoder, traced with its attention swapped, in two forms.

*fused*: ``com.microsoft.GroupQueryAttention`` with the KV cache and the rotary inside, one operator
for each RMSNorm, logits of the last tokens only. *portable*: standard operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn

from lora_edge.base.checkpoint import Base
from lora_edge.base.experts import parameter_modules
from lora_edge.base.families import OPTIMUM
from lora_edge.base.mapped import Mapped
from lora_edge.base.model import load_model, model_layers, path_of, tied_pair
from lora_edge.bundle.part import Cache, Part
from lora_edge.capture.attention import (
    AttentionSwap,
    Fused,
    Portable,
    Survey,
    TraceCache,
)
from lora_edge.capture.base_graph import BaseGraph
from lora_edge.capture.conditional import lower_choices
from lora_edge.capture.experts import swapped_experts
from lora_edge.capture.operators import LastPositions, LayerFacts, TakePositions
from lora_edge.capture.refusing import max_length, noted_activations, refusing
from lora_edge.capture.swaps import (
    RotarySwap,
    constant_views,
    swapped_linears,
    swapped_norms,
)
from lora_edge.capture.torchscript import name_nodes, to_onnx
from lora_edge.capture.weights import Weight, attach, placeholders
from lora_edge.errors import CaptureError, UnsupportedModelError
from lora_edge.names import NUM_LOGITS_TO_KEEP, past_name, present_name
from lora_edge.tasks.task import Task

# Sizes that no model has, so that a traced size is known for what it is.
_BATCH, _SEQ, _PAST = 3, 5, 7
# The names of the sizes that other clients know them by.
_BATCH_SIZE, _WIDTH, _TOTAL = "batch_size", "sequence_length", "total_sequence_length"


class _Traced(nn.Module):
    """The function that becomes the graph."""

    def __init__(
        self, model: nn.Module, swap: AttentionSwap, rotary: RotarySwap | None, windows: set[int]
    ) -> None:
        super().__init__()
        self.model = model
        self._swap = swap
        self._rotary = rotary
        self._windows = frozenset(windows)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        attention: Fused | Portable
        if self._rotary is not None:
            positions = LastPositions.apply(attention_mask, input_ids, rest[0])
            past = _pairs(rest[1:])
            attention = Fused(past, attention_mask, self._rotary)
        else:
            positions, past = None, _pairs(rest)
            attention = Portable(past, attention_mask, position_ids, self._windows)
        self._swap.begin(attention)
        logits = _forward(self.model, attention, input_ids, position_ids, positions)
        self._swap.check_calls(len(past))
        presents = [tensor for layer in range(len(past)) for tensor in attention.presents[layer]]
        return (logits, *presents)


def _pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _forward(
    model: Any, attention: Any, input_ids: Tensor, position_ids: Tensor, positions: Tensor | None
) -> Tensor:
    """The logits, at ``positions`` only where they are given."""
    with ExitStack() as stack:
        if positions is not None:
            head = model.get_output_embeddings()

            def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001
                return (TakePositions.apply(args[0], positions), *args[1:])

            stack.callback(head.register_forward_pre_hook(take).remove)
        logits: Tensor = model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=TraceCache(attention),
            use_cache=True,
        ).logits
        return logits


def trace(base: Base, directory: Path, task: Task, form: Literal["fused", "portable"]) -> BaseGraph:
    """Trace a decoder into ``directory/model.onnx`` and ``directory/model.onnx_data``.

    Raises:
        UnsupportedModelError: the architecture is refused.
        BaseModelError: transformers cannot load the model.
        CaptureError: the trace is not what it should be.
    """
    swap = AttentionSwap(base.model_type)
    with swap.registered(), torch.no_grad():
        model = load_model(base, swap.name, task, stored=True)
        mapped = Mapped(model, base.files)
        modules = model_layers(model)
        longest = max_length(model.config)
        rotary = RotarySwap(model, longest) if form == "fused" else None
        with noted_activations(model, modules), refusing(model, swap):
            facts = _survey(model, swap, rotary, base.model_type)
        tied = tied_pair(model)
        head = path_of(model, model.get_output_embeddings())
        graph, flattened = _export(model, swap, rotary, facts, mapped, directory)
        modules = {path: layer for path, layer in modules.items() if path not in flattened}
    onnx.save(graph, directory / "model.onnx")
    first = facts[0]
    part = Part(
        file="model.onnx",
        form=form,
        backend="trace",
        inputs=("input_ids", "attention_mask"),
        output="logits",
        vocab_size=int(model.config.get_text_config().vocab_size),
        max_length=longest,
        padding="right" if form == "fused" else "either",
        head=head,
        cache=Cache(
            kind="shared" if form == "fused" else "concatenated",
            layers=len(facts),
            kv_heads=first.kv_heads,
            head_dim=first.head_dim,
        ),
    )
    return BaseGraph(
        directory,
        {"decoder": part},
        modules,
        tied,
        head,
        base.model_type,
        parameter_modules(model),
    )


def _survey(
    model: nn.Module, swap: AttentionSwap, rotary: RotarySwap | None, model_type: str
) -> list[LayerFacts]:
    """Run the model once, without weights, to see what each layer asks of attention."""
    ids = torch.zeros(_BATCH, _SEQ, dtype=torch.long)
    positions = torch.arange(_SEQ)[None].expand(_BATCH, _SEQ)
    swap.begin(Survey())
    with ExitStack() as stack:
        if rotary is not None:
            stack.enter_context(rotary.applied())
        stack.enter_context(placeholders(model))
        stack.enter_context(swapped_linears(model))
        stack.enter_context(swapped_experts(model, sparse=rotary is not None))
        _forward(model, Survey(), ids, positions, None)
    layers = swap.calls
    if layers == 0:
        raise UnsupportedModelError(
            f"{model_type} models are refused: they do not use the common attention interface",
            OPTIMUM,
        )
    swap.check_calls(layers)
    facts = [swap.facts[layer] for layer in range(layers)]
    if rotary is not None and facts[0].head_dim % 8:
        raise UnsupportedModelError(
            f"head_dim is {facts[0].head_dim}; the fused attention operator takes multiples of 8",
            "Use --form portable.",
        )
    for field in ("kv_heads", "head_dim"):
        values = {getattr(fact, field) for fact in facts}
        if len(values) > 1:
            raise UnsupportedModelError(
                f"{model_type} models are refused: {field} differs between layers: "
                f"{sorted(values)}",
                OPTIMUM,
            )
    return facts


def _export(
    model: nn.Module,
    swap: AttentionSwap,
    rotary: RotarySwap | None,
    facts: list[LayerFacts],
    mapped: Mapped,
    directory: Path,
) -> tuple[onnx.ModelProto, set[str]]:
    """The graph, and the linear layers whose activations are flattened, which take no branch."""
    first = facts[0]
    parts: tuple[Literal["key"], Literal["value"]] = ("key", "value")
    past = [past_name(layer, part) for layer in range(len(facts)) for part in parts]
    present = [present_name(layer, part) for layer in range(len(facts)) for part in parts]
    example: dict[str, Tensor] = {
        "input_ids": torch.zeros(_BATCH, _SEQ, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, _SEQ + _PAST, dtype=torch.long),
        "position_ids": torch.arange(_PAST, _PAST + _SEQ)[None].repeat(_BATCH, 1),
    }
    dims = {
        "input_ids": {0: _BATCH_SIZE, 1: _WIDTH},
        "attention_mask": {0: _BATCH_SIZE, 1: _TOTAL},
        "position_ids": {0: _BATCH_SIZE, 1: _WIDTH},
        "logits": {0: _BATCH_SIZE, 1: _WIDTH if rotary is None else "num_logits"},
    }
    if rotary is not None:
        example[NUM_LOGITS_TO_KEEP] = torch.tensor(2)
    for name in past:
        example[name] = torch.zeros(_BATCH, first.kv_heads, _PAST, first.head_dim)
        dims[name] = {0: _BATCH_SIZE, 2: "past_sequence_length"}
    for name in present:
        # A shared cache is longer than the mask; a name of its own keeps their sizes apart.
        dims[name] = {
            0: _BATCH_SIZE,
            2: _TOTAL if rotary is None else "present_sequence_length",
        }

    traced = _Traced(model, swap, rotary, {fact.window for fact in facts})
    with ExitStack() as stack:
        weights = stack.enter_context(placeholders(model))
        stack.enter_context(swapped_linears(model))
        flattened = stack.enter_context(swapped_experts(model, sparse=rotary is not None))
        if rotary is not None:
            stack.enter_context(swapped_norms(model))
            stack.enter_context(rotary.applied())
        stack.enter_context(constant_views(_BATCH, _SEQ))
        stack.enter_context(refusing(model, swap))
        domains = {"com.microsoft": 1} if rotary is not None else None
        graph = to_onnx(traced, example, ["logits", *present], dims, domains=domains)
    lower_choices(graph)
    add_buffers(model, graph, weights)
    missing = attach(graph, weights, directory / "model.onnx_data", mapped)
    check_inputs(model, graph, set(example), missing, weights)
    name_nodes(graph)
    return graph, flattened


def add_buffers(model: nn.Module, graph: onnx.ModelProto, weights: dict[str, Weight]) -> None:
    """Count the buffers that the graph reads (a router's correction of scores) as weights."""
    buffers = dict(model.named_buffers())
    for value in graph.graph.input:
        if value.name in buffers and value.name not in weights:
            weights[value.name] = Weight(buffers[value.name], transpose=False)


def check_inputs(
    model: nn.Module,
    graph: onnx.ModelProto,
    expected: set[str],
    missing: list[str],
    weights: Mapping[str, Weight],
) -> None:
    """Check that every weight is in the graph, and every input is one that was asked for.

    Raises:
        UnsupportedModelError: the model does not read some of its weights; names them.
        CaptureError: there are inputs that nobody asked for.
    """
    kind = type(model).__name__
    if missing:
        raise UnsupportedModelError(
            f"{kind} models are refused: {len(missing)} of {len(weights)} weights take no part in "
            f"a pass ({', '.join(missing[:3])}), so that an adapter on them could not be exported",
            "Use a class of model that reads them all, or save the model without them.",
        )
    strange = [value.name for value in graph.graph.input if value.name not in expected]
    if strange:
        raise CaptureError(
            f"{kind} models are refused: their trace has {len(strange)} inputs that nobody asked "
            f"for ({', '.join(strange[:3])})",
            OPTIMUM,
        )
