"""PEFT's models: adapters attached, weighted, switched off, and listened to while they run.

One of the few files of this package that import torch, transformers or peft.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.directory import CONFIG_FILE, TENSOR_FILE, read_config, tensor_keys
from lora_edge.adapter.targets import check_patterns
from lora_edge.base.quiet import quiet
from lora_edge.errors import AdapterError
from lora_edge.names import canonical_peft_key
from lora_edge.parity.plan.states import State

# Fields of an adapter that PEFT cannot hold beside another one in the same model, and the values at
# which it can.
_APART: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None, []),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
}


def is_peft(model: Any) -> bool:
    """Whether an adapter is attached to a model."""
    return type(model).__module__.startswith("peft.")


def base_of(model: Any) -> Any:
    """The base model, inside PEFT's."""
    return model.get_base_model() if is_peft(model) else model


@contextlib.contextmanager
def without_low_rank(model: Any) -> Iterator[None]:
    """Switch the low-rank layers off, and leave the modules that the adapter replaces."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextlib.contextmanager
def widened(model: Any) -> Iterator[None]:
    """A model that is float64 as a whole inside the block; the weights come back unchanged."""
    model.double()
    try:
        yield
    finally:
        model.float()


def attached(model: Any, directory: str | os.PathLike[str], inner: str) -> Any:
    """A model with a PEFT directory attached under a name, beside those that it has.

    Raises:
        AdapterError: PEFT cannot load it.
    """
    from peft import PeftModel

    check_patterns(read_config(Path(directory)), [path for path, _ in model.named_modules()])
    with quiet(), _loadable(Path(directory)) as folder:
        try:
            adapted = model
            if not isinstance(model, PeftModel):
                adapted = PeftModel.from_pretrained(model, folder, adapter_name=inner)
            # Of an adapter that is there it reads the weights again, and says what fitted.
            result = adapted.load_adapter(folder, adapter_name=inner)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise AdapterError(
                f"PEFT cannot load {os.fspath(directory)}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}",
                "Without PEFT's own outputs nothing can be proved; save the adapter again.",
            ) from error
    _check_result(os.fspath(directory), result)
    return adapted.eval()


@contextlib.contextmanager
def running(state: State, attached: Iterable[str] = ()) -> Iterator[None]:
    """What PEFT or the model raises of itself where adapters are attached, as a refusal.

    Args:
        state: what is active.
        attached: the adapters whose layers the model has, active or not: a model may not do with a
            layer that PEFT has wrapped.

    Raises:
        AdapterError: it raised; with an adapter that it cannot run nothing can be proved.
    """
    try:
        yield
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        names = " and ".join(name for name, _ in state) or " or ".join(attached)
        if not names or "memory" in str(error):
            raise
        raise AdapterError(
            f"PEFT loads adapter {names} and cannot run it: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}",
            "Without PEFT's own outputs nothing can be proved; train it on other layers.",
        ) from error


@contextlib.contextmanager
def _loadable(directory: Path) -> Iterator[str]:
    """The folder, its tensors' keys without the adapter name ``default``.

    PEFT loads keys with that name under no other one, and two adapters cannot have it.
    """
    from safetensors.torch import load_file, save_file

    file = directory / TENSOR_FILE
    keys = tensor_keys(file) if file.is_file() else ()
    if all(key == canonical_peft_key(key) for key in keys):
        yield os.fspath(directory)
        return
    with tempfile.TemporaryDirectory(prefix="lora-edge-") as scratch:
        shutil.copyfile(directory / CONFIG_FILE, Path(scratch) / CONFIG_FILE)
        tensors = {canonical_peft_key(key): x for key, x in load_file(file).items()}
        save_file(tensors, Path(scratch) / TENSOR_FILE)
        yield scratch


def _check_result(directory: str, result: Any) -> None:
    """Refuse an adapter of which PEFT has loaded something else than what is in its folder."""
    # With bias="all" PEFT saves biases of replaced modules twice, and reads one.
    unexpected = [key for key in result.unexpected_keys if ".modules_to_save." not in key]
    for keys, what in (
        (unexpected, "drops {} of its tensors"),
        (result.missing_keys, "lacks {} tensors that its config asks for"),
    ):
        if keys:
            raise AdapterError(
                f"{directory} is refused in both modes: PEFT {what.format(len(keys))}, e.g. "
                f"{keys[0]}",
                "The config and the tensors are from different adapters, or for another base; "
                "save the adapter again with PEFT.",
            )


def stands_apart(config: Mapping[str, Any]) -> bool:
    """Whether PEFT cannot hold an adapter beside another one in the same model."""
    return any(config.get(field) not in neutral for field, neutral in _APART.items())


@contextlib.contextmanager
def scaled(model: Any, weights: Mapping[str, float]) -> Iterator[None]:
    """Scale each adapter's effect: PEFT multiplies every delta by its layer's ``scaling[name]``."""
    from peft.tuners.lora import LoraLayer

    changed: list[tuple[dict[str, float], str, float]] = []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights.items():
                if weight != 1.0 and name in module.scaling:
                    changed.append((module.scaling, name, module.scaling[name]))
                    module.scaling[name] *= weight
    try:
        yield
    finally:
        for scaling, name, value in changed:
            scaling[name] = value


@contextlib.contextmanager
def listened(model: Any, paths: Iterable[str]) -> Iterator[dict[str, list[Any]]]:
    """Collect what modules return inside the block: module path -> tensors, one for each call."""
    found: dict[str, list[Any]] = {}
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for path in paths:
            if path in modules:

                def hear(_module: Any, _args: Any, output: Any, path: str = path) -> None:
                    # A copy: what follows may add to it in place.
                    kept = output.clone() if hasattr(output, "clone") else output
                    found.setdefault(path, []).append(kept)

                stack.callback(modules[path].register_forward_hook(hear).remove)
        yield found


def once(found: Mapping[str, Sequence[Any]]) -> dict[str, NDArray[np.floating]]:
    """The outputs of modules that were called once, without the axis of the batch of one row."""
    return {
        path: (outputs[0][0] if len(outputs[0]) == 1 else outputs[0]).numpy()
        for path, outputs in found.items()
        if len(outputs) == 1 and hasattr(outputs[0], "numpy")
    }


@contextlib.contextmanager
def ran(model: Any) -> Iterator[list[str]]:
    """Note the modules of the base that have weights of their own, as they return.

    A layer that PEFT has wrapped goes by the name that it had; what an adapter adds is left out.
    """
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            path = name.replace(".base_layer", "")
            own = next(module.parameters(recurse=False), None) is not None
            if own and not any(part.startswith("lora_") for part in path.split(".")):

                def hear(_module: Any, _args: Any, _output: Any, path: str = path) -> None:
                    if path not in found:
                        found.append(path)

                stack.callback(module.register_forward_hook(hear).remove)
        yield found
