"""Which tensors of an adapter's folder PEFT loads onto a base, and what it would leave out.

PEFT puts its wrappers where the config says, and then loads the file with ``strict=False``: a key
that fits no wrapper is dropped without a word, and a wrapper that gets no tensors stays as it was
initialized (peft 0.21, ``utils/save_and_load.py:set_peft_model_state_dict``). Both are known here
from names alone, so that ``inspect``, ``add`` and ``export`` decide alike, without PyTorch. Knows
keys, configs and layers; reads no files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_edge.adapter.targets import Targets
from lora_edge.base.layer import Layer
from lora_edge.errors import AdapterError
from lora_edge.names import BASE_LAYER, PEFT_PREFIX, PeftKey, canonical_peft_key, parse_peft_key

_HINT_KEYS = "Rename the keys in adapter_model.safetensors, or save the adapter again with PEFT."
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_fsdp_wrapped_module": "FSDP",
}
_LOW_RANK = {"A", "B", "B.bias", "magnitude", "embedding_A", "embedding_B"}
_NAMED = re.compile(
    r"\.(?:lora_(?:[AB]|embedding_[AB]|magnitude_vector)|modules_to_save|trainable_tokens_delta)"
    r"\.(?P<name>[^.]+)(?:\.(?:weight|bias))?$"
)


@dataclass(frozen=True)
class BaseView:
    """What PEFT's wrappers meet of a base.

    Attributes:
        layers: module path -> layer.
        tied: module paths of the embedding and of the output layer that shares its weight, or ().
        output: module path of the output layer of a text generator; empty: none.
        whole: the layers are those of the model, with their kinds; where they are read off a
            checkpoint's names, what is not named by the adapter cannot be called missing.
    """

    layers: Mapping[str, Layer]
    tied: tuple[str, ...] = ()
    output: str = ""
    whole: bool = True


@dataclass(frozen=True)
class Loading:
    """What PEFT does with the tensors of a folder.

    Attributes:
        unexpected: key -> why PEFT drops it.
        missing: keys of the low-rank tensors that PEFT's wrappers want and the file lacks.
        failure: what PEFT raises instead of loading; empty where it loads.
    """

    unexpected: Mapping[str, str]
    missing: tuple[str, ...] = ()
    failure: str = ""


def loading(
    config: Mapping[str, Any], keys: Collection[str], base: BaseView | None = None
) -> Loading:
    """What PEFT would do with the tensors of a folder.

    Args:
        config: ``adapter_config.json`` of a LoRA.
        keys: of the tensors in the file.
        base: what it would be loaded onto; without one, what the config and the keys say of
            themselves.

    Raises:
        AdapterError: a pattern of the config is no regular expression.
    """
    failure = _config_failure(config)
    if failure:
        return Loading({}, (), failure)
    targets = targets_on(config, base)
    parsed = {key: parse_peft_key(key) for key in keys}
    unexpected: dict[str, str] = {}
    for key, tensor in parsed.items():
        reason = _dropped(key, tensor, targets, base, config, keys)
        if reason:
            unexpected[key] = reason
    if base is None or not base.whole:
        return Loading(unexpected)
    have = {canonical_peft_key(key) for key in keys if key not in unexpected}
    hit = [path for path in base.layers if targets.decide(path).hit]
    found = [path for path in hit if base.layers[path].kind != "norm"]
    others = {path for path in _above(base.layers) if targets.decide(path).hit}
    others |= set(hit) - set(found)
    if not targets.decided:
        failure = "target_modules is not set, and PEFT would choose by a table of its own"
    elif others:
        failure = f"target_modules names {min(others)}, on which PEFT puts no low-rank pair"
    elif not (found or config.get("target_parameters")):
        failure = "its config names no layer of the base, so that PEFT finds nothing to adapt"
    missing: list[str] = []
    if not failure:
        found += [path for path in base.layers if _weight_named(config, path)]
        wanted = (x for path in found for x in _wanted(config, path, base.layers[path]))
        missing = [key for key in wanted if not {key, f"{key}.weight"} & have]
    lost = next((x for x in _saved_keys(targets, base) if x not in keys), None)
    if lost is not None and not failure:
        failure = f"PEFT wants the tensor {lost}, for modules_to_save or a task head (KeyError)"
    return Loading(unexpected, tuple(missing), failure)


def targets_on(config: Mapping[str, Any], base: BaseView | None) -> Targets:
    """What a config asks of a base, or of any."""
    if base is None:
        return Targets(config)
    linear = [path for path, layer in base.layers.items() if layer.kind in ("linear", "head")]
    return Targets(config, linear if base.whole else None, base.tied, base.output)


def check_keys(config: Mapping[str, Any], keys: Collection[str], where: str) -> None:
    """Check that PEFT would drop none of an adapter's tensors, as far as its own folder tells.

    Args:
        config, keys: as :func:`loading`.
        where: names the folder in the error.

    Raises:
        AdapterError: it would; the cause, how many there are of it and one of them are named.
    """
    _raise(loading(config, keys), keys, where, "both modes")


def check_loading(
    config: Mapping[str, Any], keys: Collection[str], base: BaseView, where: str
) -> None:
    """Check that PEFT would load all of an adapter onto a base, and lack nothing.

    Args:
        config, keys: as :func:`loading`.
        base: the base.
        where: names the adapter in the error.

    Raises:
        AdapterError: it would not; the cause is named.
    """
    _raise(loading(config, keys, base), keys, where, "both modes")


def _raise(found: Loading, keys: Collection[str], where: str, modes: str) -> None:
    if found.failure:
        raise AdapterError(
            f"{where} is refused in {modes}: {found.failure}",
            "The config and the tensors are from different adapters; save it again with PEFT.",
        )
    if found.unexpected:
        first = next(iter(found.unexpected))
        reason = found.unexpected[first]
        others = len({*found.unexpected.values()}) - 1
        raise AdapterError(
            f"{where} is refused in {modes}: PEFT drops {len(found.unexpected)} of its "
            f"{len(keys)} tensors without a word, e.g. {first}: {reason}"
            + (f" (and {others} other reasons)" if others else ""),
            _hint_of(reason),
        )
    if found.missing:
        raise AdapterError(
            f"{where} is refused in {modes}: PEFT lacks {len(found.missing)} tensors that its "
            f"config asks for, and leaves them as they are initialized, e.g. {found.missing[0]}",
            "The config and the tensors are from different adapters, or the file is incomplete; "
            "save it again with PEFT.",
        )


def _hint_of(reason: str) -> str:
    if reason.startswith("its key"):
        return _HINT_KEYS
    return "The config and the tensors are from different adapters; save it again with PEFT."


def _dropped(
    key: str,
    tensor: PeftKey | None,
    targets: Targets,
    base: BaseView | None,
    config: Mapping[str, Any],
    keys: Collection[str],
) -> str:
    """Why PEFT drops a tensor; empty where it does not, or cannot be told."""
    segment = next((x for x in key.split(".")[:-1] if x in _WRAPPERS), "")
    if not segment and key.removeprefix(PEFT_PREFIX).startswith("module."):
        segment, wrapper = "module", "DistributedDataParallel"
    elif segment:
        wrapper = _WRAPPERS[segment]
    if segment:
        return f"its key holds {segment!r}, of {wrapper}: strip that segment"
    if not key.startswith(PEFT_PREFIX):
        return f"its key does not begin with {PEFT_PREFIX}"
    if key.startswith(PEFT_PREFIX * 2):
        return f"its key begins with {PEFT_PREFIX} twice"
    named = _NAMED.search(canonical_peft_key(key))
    if named is not None and named["name"] not in ("weight", "bias"):
        return f"its key holds {named['name']!r}, the name of the adapter: strip that segment"
    if tensor is None:
        return ""  # refused by name where it is read
    if ".modules_to_save." in key and f"{PEFT_PREFIX}{tensor.path}" not in keys:
        return "its key holds 'modules_to_save': strip that segment"
    if tensor.part == "tokens" and not config.get("trainable_token_indices"):
        return f"trainable_token_indices is {config.get('trainable_token_indices')!r}"
    inner = BASE_LAYER in key and tensor.part in ("base", "saved")
    module = tensor.path if tensor.part == "base" else tensor.path.rpartition(".")[0]
    if inner and targets.decided and not _parameter_owner(config, module):
        # With the embedding, which is tied to it, PEFT may adapt an output layer too.
        hit = targets.decide(module).hit or (base is None and targets.could_tie(module))
        return "" if hit else f"it belongs to an adapted layer, and {targets.decide(module).reason}"
    own = tensor.path.endswith(".weight")
    if tensor.part == "saved" and own and targets.decided and targets.decide(module).hit:
        return f"the weight of an adapted layer is {module}.base_layer.weight"
    if tensor.part in _LOW_RANK:
        return _low_rank_dropped(key, tensor, targets, base, config)
    return ""


def _low_rank_dropped(
    key: str,
    tensor: PeftKey,
    targets: Targets,
    base: BaseView | None,
    config: Mapping[str, Any],
) -> str:
    if _parameter_owner(config, tensor.path):
        return ""  # whose a tensor is, the nesting tells: lora_edge.maths.experts
    if tensor.part == "B.bias" and not config.get("lora_bias"):
        return f"lora_bias is {config.get('lora_bias')!r}"
    if tensor.part == "magnitude" and not config.get("use_dora"):
        return f"use_dora is {config.get('use_dora')!r}"
    if not targets.decided or ".base_layer." in key:
        return ""  # decided with the base; nested modules are refused where they are read
    decision = targets.decide(tensor.path)
    if base is None and targets.could_tie(tensor.path):
        return ""
    return "" if decision.hit else decision.reason


def _wanted(config: Mapping[str, Any], path: str, layer: Layer) -> Iterator[str]:
    key = f"{PEFT_PREFIX}{path}"
    if layer.kind == "embedding":
        yield from (f"{key}.lora_embedding_A", f"{key}.lora_embedding_B")
    else:
        yield from (f"{key}.lora_A.weight", f"{key}.lora_B.weight")
        if config.get("lora_bias"):
            yield f"{key}.lora_B.bias"
    if config.get("use_dora"):
        yield f"{key}.lora_magnitude_vector"


def _weight_named(config: Mapping[str, Any], path: str) -> bool:
    names = [str(x) for x in config.get("target_parameters") or ()]
    return any(f"{path}.weight" == x or f"{path}.weight".endswith(f".{x}") for x in names)


def _parameter_owner(config: Mapping[str, Any], module: str) -> bool:
    """Whether ``target_parameters`` may name a parameter of a module."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return any(
        not (owner := str(target).rpartition(".")[0]) or f".{module}".endswith(f".{owner}")
        for target in config.get("target_parameters") or ()
    )


def _above(paths: Iterable[str]) -> set[str]:
    """The modules that hold other modules."""
    found = set()
    for path in paths:
        while path := path.rpartition(".")[0]:
            found.add(path)
    return found


def _saved_keys(targets: Targets, base: BaseView) -> Iterable[str]:
    """Keys that PEFT looks up, and fails without."""
    for path, layer in base.layers.items():
        if targets.saves(path):
            yield f"{PEFT_PREFIX}{path}.weight"
            if layer.bias and path not in targets.tied_copies:
                yield f"{PEFT_PREFIX}{path}.bias"
    embedding = base.tied[0] if base.tied else None
    for path in targets.token_modules(base.layers, embedding):
        yield f"{PEFT_PREFIX}{path}.token_adapter.trainable_tokens_delta"


def _config_failure(config: Mapping[str, Any]) -> str:
    """What ``LoraConfig`` raises on; empty where it does not."""
    text = isinstance(config.get("target_modules"), str)
    for field in ("layers_to_transform", "layers_pattern"):
        if text and config.get(field) is not None:
            return f"{field} is set and target_modules is a pattern, which PEFT does not take"
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        return "layers_pattern is set without layers_to_transform, which PEFT does not take"
    return ""
