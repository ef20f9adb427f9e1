"""Adapters whose modules have other names than the base's have today, and parts that nobody reads.

transformers renames modules between releases, and calls a text model otherwise where it is part of
a vision-language model. A name is changed only where every module of the adapter is then one of the
base's. Knows adapters and module paths; knows nothing of PyTorch.

Source: ``transformers/conversion_mapping.py`` (5.x), which does the same for checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_edge.adapter.directory import (
    CONFIG_FILE,
    ORIGINAL_CONFIG_FILE,
    TENSOR_FILE,
    TRAINING_FILE,
    tensor_file,
)
from lora_edge.adapter.load import Adapter, load_adapter
from lora_edge.adapter.targets import Targets
from lora_edge.base.checkpoint import Base
from lora_edge.base.layers import built_layers
from lora_edge.errors import UnsupportedAdapterError
from lora_edge.files.safetensors import rename_tensors
from lora_edge.names import PEFT_PREFIX, parse_peft_key
from lora_edge.tasks.task import TASKS, Task

Rules = tuple[tuple[str, str], ...]

_VIT: Rules = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.query", "q_proj"),
    (r"attention\.key", "k_proj"),
    (r"attention\.value", "v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)
_DINO: Rules = (
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"mlp\.weights_out", "mlp.down_proj"),
)
_SWIN: Rules = (
    (r"attention\.self\.query", "attention.q_proj"),
    (r"attention\.self\.key", "attention.k_proj"),
    (r"attention\.self\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)
SINCE_5: Mapping[str, Rules] = {
    **dict.fromkeys(("vit", "deit", "ijepa", "vit_msn", "beit"), _VIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINO),
    "swin": _SWIN,
}
"""Model type -> how transformers 5 changed the names of its modules, one rule after another."""

# How a vision-language model calls its text model, in several releases; the text model's own name.
_TEXT_PARTS: tuple[Rules, ...] = (
    ((r"^model\.language_model\.", "model."),),
    ((r"^language_model\.model\.", "model."), (r"^language_model\.lm_head", "lm_head")),
    (
        (r"^model\.language_model\.model\.", "model."),
        (r"^model\.language_model\.lm_head", "lm_head"),
    ),
    ((r"^language_model\.", "model."),),
    ((r"^model\.text_model\.", "model."),),
    ((r"^thinker\.model\.", "model."), (r"^thinker\.lm_head", "lm_head")),
)  # fmt: skip
_UNREAD = [unread.modules for facts in TASKS.values() for unread in facts.unread]


def without_unread(
    adapter: Adapter, modules: Collection[str], task: Task, say: Callable[[str], None]
) -> Adapter:
    """An adapter without the parts that cannot change what is exported, each of them named.

    These are the pooler where features are wanted, and the images' part of a vision-language model
    where the base is its text model.

    Args:
        adapter: the adapter.
        modules: module paths of the base.
        task: what the base does.
        say: called with one line for what is left out.

    Raises:
        UnsupportedAdapterError: it changes nothing else.
    """
    told = {path for path in _owners(adapter) if path not in modules}
    dropped: set[str] = set()
    for unread, reason in task.facts.unread:
        found = {path for path in told if unread.search(path)}
        if not found:
            continue
        first = min(found)
        if found == _owners(adapter):
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} changes {first} and nothing else that is read: {reason}",
                "Is it for another task (--task), or another part of the model?",
            )
        say(f"{adapter.name}: {len(found)} modules are left out ({first} …): {reason}")
        dropped |= found
    return _without(adapter, dropped) if dropped else adapter


def new_names(adapter: Adapter, modules: Collection[str], model_type: str) -> dict[str, str]:
    """Module path of an adapter -> the base's; empty where the names are the base's already.

    Args:
        adapter: the adapter.
        modules: module paths of the base.
        model_type: of the base.
    """
    owners = _owners(adapter)
    if owners <= set(modules):
        return {}
    for rules in (SINCE_5.get(model_type, ()), *_TEXT_PARTS):
        names = {path: _renamed(path, rules) for path in owners}
        if set(names.values()) <= set(modules) and len(set(names.values())) == len(names):
            return {old: new for old, new in names.items() if old != new}
    return {}


@contextlib.contextmanager
def fitted(
    adapters: Sequence[Adapter], base: Base, task: Task, say: Callable[[str], None]
) -> Iterator[list[Adapter]]:
    """The adapters as a base's model of today takes them; see :func:`fitted_to`."""
    if not any(_may_be_renamed(adapter, base.model_type) for adapter in adapters):
        yield list(adapters)
        return
    layers = built_layers(base, task).modules
    with fitted_to(adapters, layers, base.model_type, task, say) as found:
        yield found


@contextlib.contextmanager
def fitted_to(
    adapters: Sequence[Adapter],
    modules: Collection[str],
    model_type: str,
    task: Task,
    say: Callable[[str], None],
) -> Iterator[list[Adapter]]:
    """The adapters with the names of a base's modules, without what nobody reads.

    Those that are renamed lie in folders that exist inside the block only.

    Args:
        adapters: as they were loaded.
        modules: module paths of the base.
        model_type: of the base.
        task: what the base does.
        say: called with one line for each change.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="lora-edge-") as scratch:
        for index, whole in enumerate(adapters):
            adapter = without_unread(whole, modules, task, say)
            names = new_names(adapter, modules, model_type)
            if names:
                old, new = next(iter(names.items()))
                say(f"{adapter.name}: {len(names)} modules are renamed: {old} is {new} today")
                adapter = saved_renamed(adapter, names, Path(scratch) / str(index))
            found.append(adapter)
        yield found


def _may_be_renamed(adapter: Adapter, model_type: str) -> bool:
    """Whether a rule changes any name of an adapter, or a part may be left out."""
    rules = [*SINCE_5.get(model_type, ()), *(rule for part in _TEXT_PARTS for rule in part)]
    return any(
        any(unread.search(path) for unread in _UNREAD) or _renamed(path, rules) != path
        for path in _owners(adapter)
    )


def renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """An adapter with its modules' new names, in memory only; its config names whole paths."""
    changed = replace(
        adapter,
        modules={
            names.get(old, old): replace(module, path=names.get(old, old))
            for old, module in adapter.modules.items()
        },
        saved={_parameter(x, names): value for x, value in adapter.saved.items()},
        tokens={
            names.get(x, x): replace(rows, path=names.get(x, x))
            for x, rows in adapter.tokens.items()
        },
        base_copies={_parameter(x, names): value for x, value in adapter.base_copies.items()},
    )
    owners = _owners(adapter)
    keys = (_renamed_key(key, names, owners) for key in adapter.keys)
    return replace(
        changed,
        config=_config(adapter, changed, names),
        keys=tuple(key for key in keys if key is not None),
    )


def _config(adapter: Adapter, changed: Adapter, names: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's config of an adapter with other names, and only with the modules that are kept."""
    config: dict[str, Any] = dict(adapter.config)
    config["target_modules"] = sorted(changed.modules)
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        config[field] = None
    modules = changed.modules.items()
    ranks = {path: x.rank for path, x in modules if x.rank != config.get("r", 8)}
    alphas = {path: x.alpha for path, x in modules if x.alpha != config.get("lora_alpha", 8)}
    config["rank_pattern"] = {re.escape(path): rank for path, rank in ranks.items()}
    config["alpha_pattern"] = {re.escape(path): alpha for path, alpha in alphas.items()}
    whole = Targets(config)
    saved = {path.rpartition(".")[0] for path in adapter.saved}
    saved = {path for path in saved if whole.saves(path)}
    moved = {names.get(path, path) for path in saved}
    if not all(map(whole.saves, moved)):
        config["modules_to_save"] = sorted(moved)
    return config


def saved_renamed(adapter: Adapter, names: Mapping[str, str], folder: Path) -> Adapter:
    """Save an adapter with its modules' new names as a PEFT directory, and read it.

    The tensors are copied byte by byte; the config names every module by its whole path.

    Args:
        adapter: the adapter.
        names: of :func:`new_names`.
        folder: where; made here.

    Raises:
        UnsupportedAdapterError: it has factors of stacked parameters.
    """
    if adapter.stacked:
        raise UnsupportedAdapterError(
            f"adapter {adapter.name} is refused: its target_parameters have names of another model",
            "Train it on the base that is exported.",
        )
    folder.mkdir(parents=True)
    config = renamed(adapter, names).config
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    kept = _owners(adapter)
    rename_tensors(
        tensor_file(adapter.directory),
        folder / TENSOR_FILE,
        lambda key: _renamed_key(key, names, kept),
    )
    shutil.copyfile(adapter.directory / CONFIG_FILE, folder / ORIGINAL_CONFIG_FILE)
    if (adapter.directory / TRAINING_FILE).is_file():
        shutil.copyfile(adapter.directory / TRAINING_FILE, folder / TRAINING_FILE)
    return load_adapter(folder, adapter.name)


def _renamed_key(key: str, names: Mapping[str, str], kept: Collection[str]) -> str | None:
    """The new name of a tensor; ``None`` where its module is not kept."""
    own = key.removeprefix(PEFT_PREFIX)
    owner = max((x for x in kept if own.startswith(f"{x}.")), key=len, default=None)
    parsed = parse_peft_key(key)
    if owner is None and parsed is not None and parsed.part in ("saved", "idle"):
        # Of a module below one that is saved whole, PEFT's wrapper is in the middle of the name.
        module = parsed.path.rpartition(".")[0]
        return key if module in kept and module not in names else None
    return None if owner is None else f"{PEFT_PREFIX}{names.get(owner, owner)}{own[len(owner) :]}"


def _owners(adapter: Adapter) -> set[str]:
    parameters = (*adapter.saved, *adapter.base_copies)
    paths = {path.rpartition(".")[0] for path in parameters}
    return {*adapter.modules, *adapter.tokens, *adapter.stacked, *paths}


def _without(adapter: Adapter, dropped: Collection[str]) -> Adapter:
    """An adapter without some of its modules."""

    def of_owner(values: Mapping[str, Any]) -> dict[str, Any]:
        return {path: x for path, x in values.items() if path.rpartition(".")[0] not in dropped}

    kept = _owners(adapter) - set(dropped)
    return replace(
        adapter,
        modules={path: x for path, x in adapter.modules.items() if path not in dropped},
        saved=of_owner(adapter.saved),
        base_copies=of_owner(adapter.base_copies),
        keys=tuple(x for x in adapter.keys if _renamed_key(x, {}, kept) is not None),
    )


def _renamed(path: str, rules: Collection[tuple[str, str]]) -> str:
    for pattern, new in rules:
        path = re.sub(pattern, new, path)
    return path


def _parameter(path: str, names: Mapping[str, str]) -> str:
    owner, _, own = path.rpartition(".")
    return f"{names.get(owner, owner)}.{own}"
