"""One table of the devices: what ONNX Runtime calls each one's provider, and what that takes.

A field says what is known from a run, or from ONNX Runtime's tools, documentation or source.
Where nothing is known, it has its default. ``docs/devices.md`` shows the table.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

_SUFFIX = "ExecutionProvider"


class Target(NamedTuple):
    """A kind of device, as one execution provider of ONNX Runtime runs it.

    Attributes:
        name: short name, e.g. ``cpu``, ``cuda``.
        ort_name: ONNX Runtime's name.
        memory: where tensors are placed, as ``OrtValue`` names it.
        zero_rank: it takes tensors with a zero-size dimension, so that "no adapter" costs nothing.
        form: the form of a text generator to export for it; None where that is not known.
        fixed_shapes: it takes graphs without symbolic dimensions only.
        constant_weights: it multiplies by constant weights only, so that a merged bundle leaves
            less to the CPU: no branch's weights are constant.
        options: names of options of its own; not all of them.
    """

    name: str
    ort_name: str
    memory: Literal["cpu", "cuda"] = "cpu"
    zero_rank: bool = False
    form: Literal["fused", "portable"] | None = None
    fixed_shapes: bool = False
    constant_weights: bool = False
    options: tuple[str, ...] = ()


TARGETS = (
    Target("cpu", "CPUExecutionProvider", zero_rank=True, form="fused"),
    Target("cuda", "CUDAExecutionProvider", memory="cuda", options=("device_id", "gpu_mem_limit")),
    Target(
        "coreml",
        "CoreMLExecutionProvider",
        form="portable",
        options=(
            "ModelFormat",
            "MLComputeUnits",
            "RequireStaticInputShapes",
            "ModelCacheDirectory",
        ),
    ),
    Target("directml", "DmlExecutionProvider"),
    Target("migraphx", "MIGraphXExecutionProvider"),
    Target("nnapi", "NnapiExecutionProvider", form="portable", fixed_shapes=True),
    Target("openvino", "OpenVINOExecutionProvider", zero_rank=True, form="portable"),
    Target(
        "qnn",
        "QNNExecutionProvider",
        form="portable",
        fixed_shapes=True,
        options=("backend_path", "soc_model", "htp_arch"),
    ),
    Target("tensorrt", "TensorrtExecutionProvider", memory="cuda"),
    Target("webgpu", "WebGpuExecutionProvider", form="portable"),
    Target(
        "xnnpack",
        "XnnpackExecutionProvider",
        constant_weights=True,
        options=("intra_op_num_threads",),
    ),
)
"""Every target that is known by a short name; the CPU first."""


def target(name: str) -> Target | None:
    """The target of a short name or of ONNX Runtime's own name, in any case; None if unknown."""
    wanted = name.lower()
    return next((x for x in TARGETS if wanted in (x.name, x.ort_name.lower())), None)


def unknown(ort_name: str) -> Target:
    """The target of a provider that is not in the table: nothing is taken for granted."""
    return Target(ort_name.removesuffix(_SUFFIX).lower(), ort_name)
