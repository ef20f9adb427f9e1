"""Execution providers in packages of their own, beside ONNX Runtime: found, registered, listed.

Such a package (``onnxruntime-qnn``, ``onnxruntime-ep-webgpu``, ...) is a module whose name begins
with ``onnxruntime_`` and that has ``get_library_path()`` and ``get_ep_names()``. Its library is
loaded into the process when a provider is asked for that ONNX Runtime itself does not have.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import onnxruntime as ort

from lora_edge.errors import OptionError, ProviderError

_NO_PLUGINS = frozenset({"onnxruntime_genai", "onnxruntime_extensions"})
_BEST_FIRST = ("NPU", "GPU", "CPU")
# Of QNN's emulator, which has no NPU to ask: an NPU of generation 75.
_EMULATED = {"soc_model": "69", "htp_arch": "75"}


@cache
def packages() -> Mapping[str, Any]:
    """ONNX Runtime's name of a provider -> the installed module that brings it."""
    found: dict[str, Any] = {}
    if not hasattr(ort, "register_execution_provider_library"):
        return found
    import pkgutil

    for module in pkgutil.iter_modules():
        if not module.name.startswith("onnxruntime_") or module.name in _NO_PLUGINS:
            continue
        try:
            package = importlib.import_module(module.name)
            names = package.get_ep_names()
            path = package.get_library_path
        except (ImportError, OSError, AttributeError):  # no plugin, or one for another system
            continue
        if callable(path):
            found.update(dict.fromkeys(map(str, names), package))
    return found


@cache
def _devices(name: str) -> tuple[Any, ...]:
    """The devices of a plugin's provider; registers it, once in a process."""
    package = packages()[name]
    try:
        ort.register_execution_provider_library(name, package.get_library_path())
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise ProviderError(
            f"{name} of {package.__name__} cannot be loaded: {_first_line(error)}",
            "Check that the package fits the version of onnxruntime, and its drivers.",
        ) from error
    return tuple(device for device in ort.get_ep_devices() if device.ep_name == name)


def library(name: str) -> str:
    """Path of the library of a plugin's provider."""
    return str(packages()[name].get_library_path())


def defaults(name: str, kind: str | None, given: Collection[str]) -> dict[str, str]:
    """Options that a plugin's provider cannot do without, and that its package knows: QNN's.

    Args:
        name: ONNX Runtime's name of the provider.
        kind: of the device that was asked for; a GPU is no HTP.
        given: names of options that were given; nothing is added to a choice of a backend.
    """
    htp = getattr(packages()[name], "get_qnn_htp_path", None)
    if not callable(htp) or kind == "gpu" or {"backend_path", "backend_type"} & set(given):
        return {}
    emulator = platform.machine().lower() in ("x86_64", "amd64")
    return {"backend_path": str(htp())} | (_EMULATED if emulator else {})


def choose(name: str, kind: str | None) -> Sequence[Any]:
    """The device that a plugin's provider is to run on.

    Args:
        name: ONNX Runtime's name of the provider.
        kind: ``cpu``, ``gpu`` or ``npu``; None: the first that it has of NPU, GPU and CPU.

    Raises:
        ProviderError: its library cannot be loaded, or it finds no device on this machine.
        OptionError: it has no device of that kind.
    """
    found = _devices(name)
    if not found:
        raise ProviderError(
            f"{name} of {packages()[name].__name__} finds no device on this machine",
            "Check its driver, or choose provider cpu.",
        )
    kinds = [device.device.type.name for device in found]
    wanted = [kind.upper()] if kind is not None else _BEST_FIRST
    best = next((x for x in wanted if x in kinds), None)
    if best is None:
        raise OptionError(
            f"{name} has no device of kind {kind!r}; it has {', '.join(sorted(set(kinds)))}",
            "Leave the option device out, or name one of these.",
        )
    return [found[kinds.index(best)]]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
