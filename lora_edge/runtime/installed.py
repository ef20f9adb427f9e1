"""Which ONNX Runtime this environment has: exactly one wheel brings it, or an error says how.

``onnxruntime``, ``onnxruntime-gpu``, ``onnxruntime-openvino`` and others all bring the one Python
package ``onnxruntime``; pip lets the last one that is installed write over the others' files.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from lora_edge.errors import MissingDependencyError
from lora_edge.targets.install import line
from lora_edge.targets.target import Target

_INSTALL = (
    "Install the one for your hardware: pip install 'lora-edge[cpu]', or onnxruntime-gpu, "
    "onnxruntime-openvino, ..."
)


def require() -> None:
    """Refuse to go on without a whole ONNX Runtime.

    Raises:
        MissingDependencyError: there is none, it cannot be imported, or two wheels of different
            versions wrote over each other.
    """
    try:
        module = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "onnxruntime" or wheels():
            raise _broken(str(error)) from error
        raise MissingDependencyError(
            "running a bundle needs ONNX Runtime, which is not installed", _INSTALL
        ) from error
    except (ImportError, OSError) as error:
        raise _broken(str(error)) from error
    if not hasattr(module, "InferenceSession"):  # what an uninstalled twin leaves behind
        raise _broken("most of its files are missing")
    if len(set(wheels().values())) > 1:
        raise MissingDependencyError(*_twins(wheels()))


def _broken(reason: str) -> MissingDependencyError:
    if len(wheels()) > 1:
        return MissingDependencyError(*_twins(wheels()))
    owner = next(iter(wheels()), "onnxruntime")
    return MissingDependencyError(
        f"ONNX Runtime is installed and cannot be imported: {reason}",
        f"Install it again: pip install --force-reinstall --no-deps {owner}",
    )


@cache
def wheels() -> Mapping[str, str]:
    """Distribution -> version of everything that brings the package ``onnxruntime``."""
    found: dict[str, str] = {}
    # By the folders' names: importlib.metadata takes a tenth of a second to be imported.
    for folder in dict.fromkeys(sys.path):
        for path in sorted(Path(folder or ".").glob("onnxruntime*.dist-info")):
            if _brings(path):
                name, _, release = path.name.removesuffix(".dist-info").partition("-")
                found.setdefault(name.lower().replace("_", "-"), release)
    return found


def _brings(distribution: Path) -> bool:
    """Whether the list of a distribution's files has the package."""
    record = distribution / "RECORD"
    if not record.is_file():
        return False
    lines = record.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith("onnxruntime/__init__.py,") for line in lines)


def conflict() -> str:
    """What is wrong when two wheels bring the package, and the way out; empty where one does."""
    return " ".join(_twins(wheels())) if len(wheels()) > 1 else ""


def _twins(found: Mapping[str, str]) -> tuple[str, str]:
    named = " and ".join(f"{name} {version}" for name, version in sorted(found.items()))
    kept = next((name for name in sorted(found) if name != "onnxruntime"), "onnxruntime")
    return (
        f"{named} are installed together and write over each other's files",
        f"Keep one: pip uninstall -y {' '.join(sorted(found))}; pip install {kept}",
    )


def way_to(target: Target) -> str:
    """The line that installs a target beside or instead of what is installed; empty: not known."""
    return line(target, wheels())


def versions() -> dict[str, str]:
    """``onnxruntime`` -> its own version, and the wheel that brings it where it is another."""
    import onnxruntime

    named = {name: version for name, version in wheels().items() if name != "onnxruntime"}
    return {"onnxruntime": str(onnxruntime.__version__), **named}
