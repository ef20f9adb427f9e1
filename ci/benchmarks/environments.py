"""What others need beside this environment, set up when a bench first asks for it."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

from row import LackingError

_ROOT = Path(__file__).parents[2]


def llama_cpp_library() -> Path:
    """The folder of llama.cpp's shared libraries.

    Raises:
        LackingError: it cannot be set up here, or GGUF files cannot be written.
    """
    if find_spec("gguf") is None:
        raise LackingError("gguf is not installed; pip install gguf")
    return _set_up("llama.cpp", ["ci/llama_cpp"], ".venv-llama.cpp")


def openvino_python() -> Path:
    """The Python of an environment with OpenVINO GenAI and optimum-intel.

    Raises:
        LackingError: it cannot be set up here.
    """
    return _set_up("OpenVINO", ["ci/venv", "openvino"], ".venv-openvino") / "bin/python"


def _set_up(name: str, command: list[str], folder: str) -> Path:
    command = [str(_ROOT / command[0]), *command[1:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LackingError(f"{name} cannot be set up: {command[0]}: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise LackingError(f"{name} cannot be set up: {said[-1]}")
    return _ROOT / folder
