"""Which targets this machine can run, and why not the others."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from lora_edge.errors import MissingDependencyError, ProviderError
from lora_edge.targets.install import line
from lora_edge.targets.target import Target

_CPU = "CPUExecutionProvider"
# An ONNX file of one node: y = Relu(x), one float; opset 13.
SMALLEST = (
    b'\x08\x07:4\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x02tiZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04'
    b"\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


class Here(NamedTuple):
    """Whether a target runs on this machine.

    Attributes:
        runs: it does.
        reason: why not; empty: it does.
        way: what to do about it.
    """

    runs: bool
    reason: str = ""
    way: str = ""


def here(target: Target) -> Here:
    """Whether a target runs on this machine: a provider is started, a client is looked for."""
    if target.ort_name:
        return _provider(target)
    installers = {package.installer for package in target.packages}
    if "Maven" in installers:
        return Here(False, "it runs in apps, on a device", line(target))
    return _npm(target) if "npm" in installers else _module(target)


def _provider(target: Target) -> Here:
    try:
        from lora_edge.runtime import installed, providers
    except MissingDependencyError as error:
        return Here(False, str(error), error.hint)
    way = installed.conflict() or installed.way_to(target)
    if target.name not in providers.available():
        wheel = " and ".join(f"{name} {version}" for name, version in installed.wheels().items())
        return Here(False, f"it is not in the installed {wheel or 'ONNX Runtime'}", way)
    if target.ort_name == _CPU:
        return Here(True)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "smallest.onnx"
        graph.write_bytes(SMALLEST)
        try:
            providers.open_session(graph, providers.resolve(target.name), allow_fallback=True)
        except ProviderError as error:
            said = str(error).replace(str(graph), "a graph of one node")
            return Here(False, f"{said}. {error.hint.rstrip('.')}", way)
    return Here(True)


def _npm(target: Target) -> Here:
    if shutil.which("node") is None:
        return Here(False, "there is no node on the PATH", "install Node")
    missing = [each.name for each in target.packages if not _in_modules(each.name)]
    if missing:
        return Here(False, f"{missing[0]} is not in node_modules of this folder", line(target))
    return Here(True)


def _in_modules(name: str) -> bool:
    return (Path("node_modules") / name).is_dir()


def _module(target: Target) -> Here:
    name = target.packages[0].name
    module = name.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        return Here(False, f"{name} is not installed", line(target))
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return Here(False, f"{name} cannot be imported: {error}", line(target))
    return Here(True)
