"""Models without a cache: encoders, vision models, and decoders with a classification head.

Hugging Face's own model is traced with its attention swapped for one in standard operators whose
mask is made here, from the attention mask alone; rows are padded on the right.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from lora_edge.base.checkpoint import Base
from lora_edge.base.model import load_model, model_layers
from lora_edge.bundle.part import Part
from lora_edge.capture.attention import MASKED, Call, RegisteredAttention, explicit_attention
from lora_edge.capture.base_graph import BaseGraph
from lora_edge.capture.refusing import max_length, noted_activations, refusing
from lora_edge.capture.swaps import constant_views, replaced, swapped_linears
from lora_edge.capture.torchscript import name_nodes, to_onnx
from lora_edge.capture.trace import (
    add_buffers,
    check_inputs,
)
from lora_edge.capture.weights import attach, placeholders
from lora_edge.errors import BaseModelError, CaptureError, UnsupportedModelError
from lora_edge.files.json import read_object
from lora_edge.tasks.task import Task

# Sizes that no model has, so that a traced size is known for what it is.
_BATCH, _SEQ = 3, 5
# Parameters that only training reads.
_TRAINING_ONLY = ("mask_token",)


class MaskedAttention(RegisteredAttention):
    """Attention without a cache, causal or in both directions, as each layer asks for it.

    Counts its calls: a layer that computes its attention elsewhere would be traced with a mask that
    nobody made. Images have no mask, so there a model may compute its attention as it likes.
    """

    def __init__(self, model_type: str) -> None:
        super().__init__(model_type)
        self._mask: Tensor | None = None
        self._made: dict[tuple[bool, int], Tensor] = {}
        self._modules: list[nn.Module] = []

    def begin(self, attention_mask: Tensor | None) -> None:
        """Start a forward pass; ``attention_mask``: ``[batch, seq]``, ``None`` for images."""
        self._mask = attention_mask
        self._made = {}
        self._modules = []
        self.calls = 0

    def check_calls(self, config: Any) -> None:
        """Check that the pass over texts that just ended called the function once for each layer.

        Args:
            config: the model's.

        Raises:
            UnsupportedModelError: it did not.
        """
        if not self._modules:
            self._refuse("they do not use the common attention interface")
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if self.calls != layers:
            self._refuse(f"the attention function ran {self.calls} times in {layers} layers")

    def check_shared(self) -> None:
        """Check that no layer ran twice in the pass that just ended.

        Raises:
            UnsupportedModelError: one did.
        """
        if len(set(map(id, self._modules))) < len(self._modules):
            self._refuse("its layers share their weights, so that a site would be several nodes")

    def _attend(self, call: Call) -> Tensor:
        module, causal = call.module, call.is_causal
        if call.mask is not None:
            self._refuse(f"{type(module).__name__} makes an attention mask of its own")
        if causal is None:
            causal = getattr(module, "is_causal", None)
        if causal is None:
            self._refuse(f"{type(module).__name__} does not say whether it is causal")
        self._modules.append(module)
        mask = self._additive(bool(causal), call.facts.window)
        return explicit_attention(call.facts, mask, *call.states)

    def _additive(self, causal: bool, window: int) -> Tensor | None:
        """``[batch, 1, seq | 1, seq]``, one for each kind of layer; ``None``: all is seen."""
        if self._mask is None:
            if causal or window:
                self._refuse("it attends to images causally, or in a window")
            return None
        if (causal, window) not in self._made:
            visible = self._mask[:, None, None, :] > 0
            if causal or window:
                places = torch.arange(self._mask.shape[1])
                distance = places[:, None] - places[None, :]
                distance = distance if causal else distance.abs()
                seen = distance >= 0
                visible = visible & (seen & (distance < window) if window else seen)
            self._made[causal, window] = torch.where(visible, 0.0, MASKED)
        return self._made[causal, window]


class _Traced(nn.Module):
    """The function that becomes the graph."""

    def __init__(self, model: nn.Module, swap: MaskedAttention, part: Part, task: Task) -> None:
        super().__init__()
        self.model = model
        self._swap = swap
        self._part = part
        self._by_token = task.facts.by_token and task.output == "logits"

    def forward(self, *tensors: Tensor) -> Tensor:
        feeds = dict(zip(self._part.inputs, tensors, strict=True))
        self._swap.begin(feeds.get("attention_mask"))
        config: Any = self.model.config
        found: Tensor = getattr(self.model(**feeds), self._part.output)
        wanted = 3 if self._part.output == "last_hidden_state" or self._by_token else 2
        if found.ndim != wanted:
            raise UnsupportedModelError(
                f"{config.model_type} models are refused: their {self._part.output} is "
                f"{list(found.shape)}, expected {wanted} dimensions",
                "Use a task that gives a vector for each row or token.",
            )
        self._swap.check_shared()
        if not self._part.sample:
            self._swap.check_calls(config)
        return found


def trace_encoder(base: Base, directory: Path, task: Task, form: str) -> BaseGraph:  # noqa: ARG001
    """Trace a model into ``directory/model.onnx`` and ``directory/model.onnx_data``.

    What has no cache has one form, the portable.

    Raises:
        UnsupportedModelError: the architecture is refused.
        BaseModelError: transformers cannot load the model, or the base lacks more than the head.
        CaptureError: the trace is not what it should be.
    """
    swap = MaskedAttention(base.model_type)
    with swap.registered(), torch.no_grad():
        model = load_model(base, swap.name, task)
        model.config.use_cache = False
        part = _part(model, task, base)
        modules = model_layers(model)
        traced = _Traced(model, swap, part, task)
        with refusing(model, swap, images=bool(part.sample)), _as_untraced(part):
            # What is refused is refused before it is traced.
            with noted_activations(model, modules, _BATCH if part.sample else None):
                traced(*_example(part).values())
            graph = _export(traced, part, task, directory)
    nodes = {node.name for node in graph.graph.node}
    linears = [path for path, layer in modules.items() if layer.kind == "linear"]
    lost = sorted(set(linears) - nodes)
    if lost:
        raise CaptureError(
            f"the trace has no node of its own for {len(lost)} of {len(linears)} linear layers: "
            f"{', '.join(lost[:3])}",
            "This is a fault of lora-edge; please report it with the model's config.json.",
        )
    onnx.save(graph, directory / "model.onnx")
    head = task.label_layer(model)
    if head:
        modules[head] = replace(modules[head], kind="head")
    return BaseGraph(directory, {"encoder": part}, modules, (), head, base.model_type)


@contextmanager
def _as_untraced(part: Part) -> Iterator[None]:
    """Images have one size, so that no position need be interpolated, as models do in a trace."""
    with replaced(torch.jit, "is_tracing", lambda: False) if part.sample else nullcontext():
        yield


def _part(model: Any, task: Task, base: Base) -> Part:
    if "pixel_values" in (model.main_input_name, task.facts.takes):
        return Part(
            file="model.onnx",
            form="portable",
            backend="trace",
            inputs=("pixel_values",),
            output=task.output,
            vocab_size=0,
            max_length=0,
            pad_token_id=0,
            sample=_image(model, base),
        )
    config = model.config.get_text_config()
    lacking = [x for x in ("vocab_size", "pad_token_id") if not hasattr(config, x)]
    if lacking:  # CANINE reads characters, Perceiver bytes
        raise UnsupportedModelError(
            f"{base.name_or_path} is a {type(model).__name__}, whose config has no {lacking[0]}: "
            "it reads no tokens of a vocabulary",
            "Export a model that reads the ids of a tokenizer.",
        )
    inputs = ["input_ids", "attention_mask"]
    if (getattr(config, "type_vocab_size", None) or 0) > 1 and _takes(model, "token_type_ids"):
        inputs.append("token_type_ids")
    if config.pad_token_id is None and _is_pooled_at_the_end(model, task):
        raise UnsupportedModelError(
            f"{base.name_or_path} has no pad_token_id, by which a {type(model).__name__} finds the "
            "last token of a row",
            "Set pad_token_id in its config.json to the one that the adapter was trained with.",
        )
    return Part(
        file="model.onnx",
        form="portable",
        backend="trace",
        inputs=tuple(inputs),
        output=task.output,
        vocab_size=int(config.vocab_size),
        max_length=_positions(model),
        pad_token_id=int(config.pad_token_id or 0),
    )


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(model).forward).parameters


def _is_pooled_at_the_end(model: nn.Module, task: Task) -> bool:
    return task.name == "text-classification" and hasattr(model, "score")


def _image(model: Any, base: Base) -> tuple[int, int, int]:
    """Channels, height and width of the images: the config's, else the preprocessor's.

    Raises:
        UnsupportedModelError: neither says.
    """
    config = model.config
    size = getattr(config, "image_size", None) or _preprocessed(base)
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    channels = getattr(config, "num_channels", 3)
    if not all(isinstance(x, int) and x > 0 for x in (channels, height, width)):
        raise UnsupportedModelError(
            f"{config.model_type} models are refused: the size of the images is not said: "
            f"image_size is {size!r}, num_channels is {channels!r}",
            "Put a preprocessor_config.json with crop_size or size beside the base's config.json.",
        )
    return channels, height, width


def _preprocessed(base: Base) -> Any:
    """The size that ``preprocessor_config.json`` cuts or scales images to; ``None``: not said."""
    file = base.directory / "preprocessor_config.json"
    if not file.is_file():
        return None
    config = read_object(file, BaseModelError, "Download it again.", nonfinite=True)
    for field in ("crop_size", "size"):
        size = config.get(field)
        if field == "crop_size" and not config.get("do_center_crop", True):
            continue
        if isinstance(size, dict):
            size = (size.get("height"), size.get("width")) if "height" in size else None
        if size:
            return size
    return None


def _positions(model: nn.Module) -> int:
    """Positions of the longest sequence; RoBERTa's count from behind the padding's position."""
    config: Any = model.config
    for path, module in model.named_modules():
        if (
            path.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return max_length(config.get_text_config())


def _example(part: Part) -> dict[str, Tensor]:
    example: dict[str, Tensor] = {}
    for name in part.inputs:
        if name == "pixel_values":
            example[name] = torch.zeros(_BATCH, *part.sample)
        else:
            fill = 1 if name == "attention_mask" else 0
            example[name] = torch.full((_BATCH, _SEQ), fill, dtype=torch.long)
    return example


def _export(traced: _Traced, part: Part, task: Task, directory: Path) -> onnx.ModelProto:
    example = _example(part)
    dims = {
        name: {0: "batch_size"} if part.sample else {0: "batch_size", 1: "sequence_length"}
        for name in example
    }
    by_token = task.facts.by_token and not part.sample
    dims[part.output] = {0: "batch_size", 1: "sequence_length"} if by_token else {0: "batch_size"}
    with ExitStack() as stack:
        weights = stack.enter_context(placeholders(traced.model))
        stack.enter_context(swapped_linears(traced.model))
        stack.enter_context(constant_views(_BATCH, None if part.sample else _SEQ))
        graph = to_onnx(traced, example, [part.output], dims)
    add_buffers(traced.model, graph, weights)
    missing = attach(graph, weights, directory / "model.onnx_data")
    missing = [name for name in missing if name.rpartition(".")[2] not in _TRAINING_ONLY]
    check_inputs(traced.model, graph, set(example), missing, weights)
    name_nodes(graph)
    return graph
