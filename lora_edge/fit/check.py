"""Whether an adapter fits a base: its layers, their shapes, copies of the base's weights.

Knows adapters and layers; knows nothing of graphs, files or PyTorch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.load import Adapter
from lora_edge.adapter.loading import BaseView, check_loading, targets_on
from lora_edge.adapter.types import MERGE_FIRST
from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.maths.experts import ParameterModule, place_of
from lora_edge.tasks.task import Task

Weights = Callable[[str], "NDArray[np.floating] | None"]
"""Parameter path -> the base's value in the checkpoint's layout; ``None`` where it has none."""

_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
# What has a row for each token: embeddings and output layers, by the names of the usual families.
_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|embed_out|shared|lm_head)$"
)
_NO_BIAS = ("bias", "embedding")


def check_modules(
    adapter: Adapter,
    modules: Mapping[str, Layer],
    where: str,
    stacks: Mapping[str, ParameterModule] | None = None,
) -> None:
    """Check that every layer that an adapter changes is there, of its kind and in its shape.

    Args:
        adapter: the adapter.
        modules: module path -> layer of the base.
        where: names the base, or the graph, in errors.
        stacks: module path -> module with stacked parameters (experts).

    Raises:
        AdapterError: a layer is missing (near misses are named), or has another shape.
        UnsupportedAdapterError: it changes something that is no layer of a known kind.
    """
    for path in adapter.stacked:
        if path not in (stacks or {}):
            near = difflib.get_close_matches(path, stacks or {}, n=3)
            raise AdapterError(
                f"adapter {adapter.name} changes parameters of {path}, and {where} has no stacked "
                f"parameters there" + (f"; near misses: {', '.join(near)}" if near else ""),
                f"The adapter is for another base: {adapter.base_model}",
            )
    for path, module in adapter.modules.items():
        place = place_of(path, stacks or {})
        if place is not None and module.bias is not None:
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused in both modes: {path}, a layer of one expert, "
                "has a bias of B, and a stacked parameter has none",
                MERGE_FIRST,
            )
        if place is not None:
            if place.size != (module.out_features, module.in_features):
                raise AdapterError(
                    f"adapter {adapter.name}: {path} is [{module.in_features} -> "
                    f"{module.out_features}], {where} has [{place.size[1]} -> {place.size[0]}] in "
                    f"{place.parameter}",
                    f"The adapter is for another base: {adapter.base_model}",
                )
            continue
        entry = _entry(adapter, modules, path, where)
        if entry.refusal:
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused in both modes: {path} {entry.refusal}",
                "Leave the layer out of target_modules; modules_to_save takes it whole.",
            )
        wanted = (module.in_features, module.out_features)
        kinds = {"linear": ("linear", "head"), "embedding": ("embedding",), "conv": ("conv",)}
        if entry.kind not in kinds[module.kind] or wanted != (
            entry.in_features,
            entry.out_features,
        ):
            raise AdapterError(
                f"adapter {adapter.name}: {path} is a {module.kind} layer [{wanted[0]} -> "
                f"{wanted[1]}], {where} has a {entry.kind} layer "
                f"[{entry.in_features} -> {entry.out_features}]",
                _hint_of_sizes(adapter, path, wanted, (entry.in_features, entry.out_features)),
            )
    for path, tokens in adapter.tokens.items():
        entry = _entry(adapter, modules, path, where)
        vocab, size = entry.in_features, entry.out_features
        if entry.kind != "embedding":
            vocab, size = size, vocab
        if tokens.rows.shape[1] != size or max(tokens.indices) >= vocab:
            raise AdapterError(
                f"adapter {adapter.name}: {path} has trained rows {tokens.rows.shape} up to token "
                f"{max(tokens.indices)}, {where} has [{vocab}, {size}] there",
                _hint_of_sizes(
                    adapter, path, (max(tokens.indices) + 1, tokens.rows.shape[1]), (vocab, size)
                ),
            )
    for path in adapter.saved:
        module_path, _, own = path.rpartition(".")
        layer = modules.get(module_path)
        if own not in ("weight", "bias") or layer is None or (own, layer.kind) == _NO_BIAS:
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused in both modes: it replaces {path}, which is no "
                f"weight or bias of a linear, embedding, convolution or norm layer of {where}",
                f"If the adapter is for this base, and not for another: {MERGE_FIRST}",
            )
        if layer.refusal and layer.kind != "conv":
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused in both modes: {module_path} {layer.refusal}",
                "Leave the layer out of modules_to_save.",
            )
        expected = _shape_of(layer, own)
        if expected is not None and adapter.saved[path].shape != expected:
            raise AdapterError(
                f"adapter {adapter.name} replaces {path} by {adapter.saved[path].shape}, {where} "
                f"has {expected} there",
                _hint_of_sizes(adapter, module_path, adapter.saved[path].shape, expected),
            )


def check_loads(adapter: Adapter, base: BaseView) -> None:
    """Check that PEFT would load all of an adapter onto a base, and leave nothing of it out.

    Raises:
        AdapterError: it would not; the cause is named.
    """
    check_loading(adapter.config, adapter.keys, base, f"adapter {adapter.name}")
    for path in adapter.saved:
        owner = path.rpartition(".")[0]
        if adapter.tied_along(owner) and owner not in base.tied[1:]:
            raise AdapterError(
                f"adapter {adapter.name} saved {path} along with the embedding, for "
                "ensure_weight_tying, and the base's output layer is not tied to its embedding",
                f"The adapter is for another base: {adapter.base_model}",
            )
    if targets_on(adapter.config, base).tied_copies:
        first, second = (adapter.saved[f"{path}.weight"] for path in base.tied)
        if not np.array_equal(first, second):
            raise AdapterError(
                f"adapter {adapter.name} holds other values for {base.tied[1]} than for "
                f"{base.tied[0]}, though its config says ensure_weight_tying",
                "Save the adapter again with PEFT.",
            )


def _hint_of_sizes(
    adapter: Adapter, path: str, theirs: tuple[int, ...], ours: tuple[int, ...]
) -> str:
    """What to do where a layer's sizes are not the base's.

    Args:
        adapter: the adapter.
        path: module path.
        theirs: its sizes, in the adapter.
        ours: in the base.
    """
    differing = [pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]]
    if len(theirs) == len(ours) and len(differing) == 1 and _VOCABULARY.search(path):
        return (
            f"The vocabulary was resized: the adapter's has {differing[0][0]} tokens, the base's "
            f"{differing[0][1]}. Save the resized base that it was trained on "
            "(model.resize_token_embeddings, then save_pretrained) and give that one."
        )
    return f"The adapter is for another base: {adapter.base_model}"


def _shape_of(layer: Layer, own: str) -> tuple[int, ...] | None:
    """The shape of a layer's weight or bias in the checkpoint; ``None`` where it may be any."""
    if layer.kind == "head" or (layer.kind == "conv" and own == "weight"):
        return None
    if own == "bias" or layer.kind == "norm":
        return (layer.out_features,)
    if layer.kind == "embedding" or layer.transposed:
        return layer.in_features, layer.out_features
    return layer.out_features, layer.in_features


def changeable(layers: Mapping[str, Layer], task: Task) -> Mapping[str, Layer]:
    """The layers that an adapter may change: of an encoder-decoder, those that are in one graph."""
    return {path: x for path, x in layers.items() if x.kind not in task.shared}


def check_kinds(adapter: Adapter, layers: Mapping[str, Layer], task: Task) -> None:
    """Check that an adapter changes no embeddings of an encoder-decoder, which both graphs read.

    Raises:
        UnsupportedAdapterError: it does; the layer is named. Or it is an activated LoRA.
    """
    if not task.seq2seq:
        return
    able = changeable(layers, task)
    hint = "Train it on other layers (target_modules), or merge it into the base with PEFT."
    if adapter.invocation:
        raise UnsupportedAdapterError(
            f"adapter {adapter.name} is refused: an activated LoRA belongs to decoder-only models",
            "Train a plain LoRA.",
        )
    owners = {path.rpartition(".")[0] for path in adapter.saved}
    for path in (*adapter.modules, *adapter.tokens, *sorted(owners)):
        if path in layers and path not in able:
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused: {path} is a layer of kind "
                f"{layers[path].kind}, and "
                "of an encoder-decoder only linear layers, convolutions and norms take changes",
                hint,
            )


def check_base_of(adapter: Adapter, fingerprint: str, name: str) -> None:
    """Check that an adapter was trained on this base, where its trainer recorded on which.

    Raises:
        AdapterError: it was another base; both fingerprints are named.
    """
    if adapter.base_fingerprint is not None and adapter.base_fingerprint != fingerprint:
        raise AdapterError(
            f"adapter {adapter.name} was trained on a base with fingerprint "
            f"{adapter.base_fingerprint[:12]}, {name} has {fingerprint[:12]}",
            f"Export it with its own base: {adapter.base_model}",
        )


def other_base(adapter: Adapter, base: Base) -> str:
    """That an adapter's config names another base than the one that is given; else empty.

    A folder and the hub id that it was downloaded from are the same if they end alike; an adapter
    whose trainer recorded the base's fingerprint says more than a name.
    """
    named = adapter.base_model
    if not named or adapter.base_fingerprint is not None:
        return ""
    folder = base.directory.resolve()
    names = {base.name_or_path, str(folder), str(base.config.get("_name_or_path"))}
    ends = {name.rstrip("/").rpartition("/")[2].lower() for name in names}
    # The hub's cache: models--ORG--NAME/snapshots/REVISION.
    ends |= {part.rpartition("--")[2].lower() for part in folder.parts if "--" in part}
    if named.rstrip("/").rpartition("/")[2].lower() in ends:
        return ""
    return (
        f"its config names the base {named}, the one given is {base.name_or_path}; the layers fit, "
        "but only the base that it was trained on gives its results"
    )


def check_copies(adapter: Adapter, weights: Weights | None, tied: tuple[str, ...]) -> None:
    """Check that what PEFT saved of the base along with an adapter is the base's.

    PEFT writes such a copy over the base when it loads the adapter, so one that differs would
    change the base for every adapter.

    Raises:
        UnsupportedAdapterError: it differs; the tensor is named.
        AdapterError: there is such a copy and the base is not at hand.
    """
    for path in adapter.base_copies:
        if base_value(adapter, weights, path, tied) is None:
            raise AdapterError(
                f"adapter {adapter.name} is refused in both modes: PEFT drops its tensor of "
                f"{path}, which its config does not name and the base does not have",
                f"The adapter is for another base: {adapter.base_model}",
            )
        if not same_copy(adapter, weights, path, tied):
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused in both modes: it was saved with {path}, which "
                "differs from the base's and would replace it for every adapter",
                hint_of_copy(adapter, weights, path, tied),
            )


def hint_of_copy(
    adapter: Adapter, weights: Weights | None, path: str, tied: tuple[str, ...]
) -> str:
    """What to do where a copy of the base's parameter that was saved along is not the base's."""
    value, copy = base_value(adapter, weights, path, tied), adapter.base_copies[path]
    if value is not None and value.shape != copy.shape:
        return _hint_of_sizes(adapter, path.rpartition(".")[0], copy.shape, value.shape)
    return "Train with modules_to_save, or save with save_embedding_layers=False."


def same_copy(adapter: Adapter, weights: Weights | None, path: str, tied: tuple[str, ...]) -> bool:
    """Whether a copy of the base's parameter that was saved along equals the base's.

    Raises:
        AdapterError: the base is not at hand.
    """
    value, copy = base_value(adapter, weights, path, tied), adapter.base_copies[path]
    return value is not None and np.array_equal(value, copy)


def base_value(
    adapter: Adapter, weights: Weights | None, path: str, tied: tuple[str, ...]
) -> NDArray[np.floating] | None:
    """The base's value of a parameter, or ``None``; a tied head has the embedding's.

    Raises:
        AdapterError: the base is not at hand.
    """
    if weights is None:
        raise AdapterError(
            f"adapter {adapter.name} cannot be added without the base: what it feeds to the graph "
            f"follows from the base's {path}",
            "Give the base model with --base.",
        )
    value = weights(path)
    if value is None and tied and path == f"{tied[1]}.weight":
        return weights(f"{tied[0]}.weight")
    return value


def _entry(adapter: Adapter, modules: Mapping[str, Layer], path: str, where: str) -> Layer:
    entry = modules.get(path)
    if entry is None:
        if _ONE_EXPERT.search(path):
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} changes {path}, a linear layer of one expert, which "
                "sees only the tokens that were sent to it; transformers 5 has no such layers, "
                f"and {where} keeps all experts in one parameter",
                MERGE_FIRST,
            )
        near = difflib.get_close_matches(path, modules, n=3)
        raise AdapterError(
            f"adapter {adapter.name} changes {path}, and {where} has no such site"
            + (f"; near misses: {', '.join(near)}" if near else ""),
            f"The adapter is for another base: {adapter.base_model}",
        )
    return entry
