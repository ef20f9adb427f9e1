"""ONNX Runtime's own format of a graph, ``.ort``, which its smaller builds for phones read.

The weights are inside, so that it is a copy of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from lora_edge.errors import BundleError
from lora_edge.runtime.providers import session_options

MOST_BYTES = (1 << 31) - (1 << 24)
"""Of weights: a file of the format has offsets of 31 bits."""

_ORT = {"session.save_model_format": "ORT"}
# Of x86-64 processors alone.
_OF_THIS_MACHINE = ["NchwcTransformer"]


def write_ort(graph: Path, target: Path, level: str) -> None:
    """Write a graph in ONNX Runtime's format.

    Args:
        graph: the ONNX file; its data lies beside it.
        target: the ``.ort`` file to make.
        level: of the optimizations that are made now: ``basic`` leaves the graph to providers,
            ``all`` is for the CPU.

    Raises:
        BundleError: ONNX Runtime cannot load the graph, or write it.
    """
    options = session_options(level, None, None, _ORT)
    options.optimized_model_filepath = str(target)
    providers = ["CPUExecutionProvider"]
    try:
        ort.InferenceSession(
            str(graph), options, providers=providers, disabled_optimizers=_OF_THIS_MACHINE
        )
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        said = next(iter(str(error).strip().splitlines()), "")
        raise BundleError(
            f"{graph.name} cannot be written in ONNX Runtime's format: {said}",
            "Export without --target mobile.",
        ) from error


def write_operators(files: Sequence[Path], target: Path) -> None:
    """Write which operators some ``.ort`` files need, as ONNX Runtime's build reads it.

    Args:
        files: the ``.ort`` files, in the folder of ``target``.
        target: the file to make.
    """
    from onnxruntime.tools.ort_format_model import utils

    utils.log.disabled = True  # it tells the user of a file that is not where it will be
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files to be closed by Python
        utils.create_config_from_models(list(files), target, enable_type_reduction=False)
    lines = target.read_text(encoding="utf-8").splitlines()
    places = {f"# - {file}": f"# - {file.name}" for file in files}  # wherever it was made
    target.write_text("\n".join(places.get(line, line) for line in lines) + "\n", encoding="utf-8")
