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
from typing import NamedTuple

from lora_edge.errors import OptionError
from lora_edge.targets.clients import GENAI, NODE, TRANSFORMERS_JS, WEB
from lora_edge.targets.providers import CPU, OPENVINO, QNN
from lora_edge.targets.target import Package, Target

_HERE = Path(__file__).parent
_DRIVERS = _HERE / "drivers"
COMMAND = "command:"
"""What a driver of the user's own begins with: ``command:adb shell run-bundle``."""


class ClientKind(NamedTuple):
    """A runtime that a bundle can be validated in.

    Attributes:
        name: as ``validate --in`` takes it.
        target: what is known of the place where the bundle runs.
        driver: the driver's file.
        arguments: of the driver.
        instead: the package that ``--client`` must have, where it is not the target's.
        beside: what else it must have.
        static: it runs the bundle's graph with fixed shapes.
    """

    name: str
    target: Target
    driver: str
    arguments: tuple[str, ...] = ()
    instead: Package | None = None
    beside: str = ""
    static: bool = False

    @property
    def half(self) -> bool:
        """It computes in float16 alone, whatever the graph says."""
        return self.target.dtypes == ("float16",)

    @property
    def package(self) -> Package:
        """What ``--client`` must have."""
        return self.instead or self.target.packages[0]

    @property
    def needs(self) -> str:
        """What ``--client`` must have, in words."""
        return f"{self.package.name}{self.beside}"


_BROWSER = ", playwright-core and Chromium"

CLIENTS = (
    ClientKind("onnxruntime", CPU, "plain.py"),
    ClientKind("openvino-ep", OPENVINO, "plain.py", ("--provider", OPENVINO.ort_name)),
    # OpenVINO reads the graph itself.
    ClientKind("openvino", OPENVINO, "plain.py", ("--openvino",), instead=Package("openvino")),
    ClientKind("static", CPU, "static.py", static=True),
    ClientKind("qnn", QNN, "static.py", ("--qnn",), beside=" and onnxruntime", static=True),
    ClientKind("genai", GENAI, "genai.py"),
    ClientKind("node", NODE, "node.mjs"),
    ClientKind("web", WEB, "web.mjs", beside=_BROWSER),
    ClientKind("webgpu", WEB, "web.mjs", ("--webgpu",), beside=_BROWSER),
    ClientKind("transformers.js", TRANSFORMERS_JS, "transformers_js.mjs"),
    ClientKind("transformers.js-web", TRANSFORMERS_JS, "transformers_js_web.mjs", beside=_BROWSER),
)
"""Every runtime that has a driver."""


def label_of(name: str) -> str:
    """What a client is called in a report: its name, or the files of a command."""
    if not name.startswith(COMMAND):
        return name
    return " ".join(Path(word).name for word in shlex.split(name.removeprefix(COMMAND))[:2])


def kind_of(name: str) -> ClientKind | None:
    """The runtime of a name; None for a command of the user's own, or an unknown name."""
    return next((each for each in CLIENTS if each.name == name), None)


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
    kind = kind_of(name)
    if kind is None:
        known = ", ".join(each.name for each in CLIENTS)
        raise OptionError(
            f"there is no client {name!r}", f"Clients are {known}, and {COMMAND}PROGRAM."
        )
    driver = str(_DRIVERS / kind.driver)
    if kind.package.installer == "pip":
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
