"""Which runtimes a bundle can be validated in, and what starts each one's driver.

A driver is a program in ``drivers/`` that runs bundles by that runtime alone: Python's have numpy
and the runtime, those in JavaScript the package ``js/``.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lora_edge.errors import OptionError

_HERE = Path(__file__).parent
_DRIVERS = _HERE / "drivers"
COMMAND = "command:"
"""What a driver of the user's own begins with: ``command:adb shell run-bundle``."""


class ClientKind(NamedTuple):
    """A runtime that a bundle can be validated in.

    Attributes:
        name: as ``validate --in`` takes it.
        runs: what runs the bundle there.
        driver: the driver's file.
        program: what runs the driver.
        needs: what ``--client`` must have: packages of Python or of npm.
        arguments: of the driver.
    """

    name: str
    runs: str
    driver: str
    program: Literal["python", "node"]
    needs: str
    arguments: tuple[str, ...] = ()


CLIENTS = (
    ClientKind(
        "onnxruntime", "plain ONNX Runtime, of any version, in Python", "plain.py", "python",
        "onnxruntime",
    ),
    ClientKind(
        "openvino-ep", "ONNX Runtime with the OpenVINO provider", "plain.py", "python",
        "onnxruntime-openvino", ("--provider", "OpenVINOExecutionProvider"),
    ),
    ClientKind(
        "openvino", "OpenVINO, which reads the graph itself", "plain.py", "python",
        "openvino", ("--openvino",),
    ),
    ClientKind("genai", "onnxruntime-genai", "genai.py", "python", "onnxruntime-genai"),
    ClientKind("node", "ONNX Runtime in Node", "node.mjs", "node", "onnxruntime-node"),
    ClientKind(
        "web", "ONNX Runtime on WebAssembly, in headless Chromium", "web.mjs", "node",
        "onnxruntime-web, playwright-core and Chromium",
    ),
    ClientKind(
        "webgpu", "ONNX Runtime on WebGPU, in headless Chromium", "web.mjs", "node",
        "onnxruntime-web, playwright-core and Chromium", ("--webgpu",),
    ),
    ClientKind(
        "transformers.js", "transformers.js in Node", "transformers_js.mjs", "node",
        "@huggingface/transformers",
    ),
)  # fmt: skip
"""Every runtime that has a driver."""


def label_of(name: str) -> str:
    """What a client is called in a report: its name, or the files of a command."""
    if not name.startswith(COMMAND):
        return name
    return " ".join(Path(word).name for word in shlex.split(name.removeprefix(COMMAND))[:2])


def scripts() -> Path:
    """The folder of the package in JavaScript: in the wheel, or beside the sources."""
    own = _HERE.parent / "js"
    return own if own.is_dir() else _HERE.parents[1] / "js"


def command_of(name: str, place: str | None = None) -> Sequence[str]:
    """What starts the driver of a runtime.

    Args:
        name: a :class:`ClientKind`'s name, or ``command:`` and a program of the user's own.
        place: where the runtime is: of Python's, an interpreter; of JavaScript's, a folder with
            ``node_modules``. ``None``: this interpreter, or the folder that one is in.

    Raises:
        OptionError: no such runtime; or what it needs is not there.
    """
    if name.startswith(COMMAND):
        return shlex.split(name.removeprefix(COMMAND))
    kind = next((each for each in CLIENTS if each.name == name), None)
    if kind is None:
        known = ", ".join(each.name for each in CLIENTS)
        raise OptionError(
            f"there is no client {name!r}", f"Clients are {known}, and {COMMAND}PROGRAM."
        )
    driver = str(_DRIVERS / kind.driver)
    if kind.program == "python":
        return [place or sys.executable, driver, *kind.arguments]
    node = shutil.which("node")
    if node is None:
        raise OptionError(f"{name} needs Node, and there is no node on the PATH", "Install Node.")
    folder = Path(place or ".").resolve()
    if not (folder / "node_modules").is_dir():
        raise OptionError(
            f"{folder} has no node_modules, in which {name} needs {kind.needs}",
            f"Install them in a folder (npm install), and give it: --client {name}=FOLDER.",
        )
    return [node, driver, str(scripts() / "src" / "index.js"), str(folder), *kind.arguments]
