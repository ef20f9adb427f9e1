"""One table of the execution providers, the CPU first. ``docs/devices.md`` shows it."""

from __future__ import annotations

from functools import partial

from lora_edge.targets.target import ANDROID, IOS, SUFFIX, Package, Target

_portable = partial(Target, forms=("portable",), dynamic_shapes=True, runtime_weights=True)
_GPU = Package("onnxruntime-gpu", systems=("Linux", "Windows"))

CPU = Target(
    "cpu",
    "the CPU",
    "CPUExecutionProvider",
    packages=(Package("onnxruntime"),),
    device="that of the machine",
    forms=("fused", "portable"),
    dynamic_shapes=True,
    zero_size=True,
    runtime_weights=True,
    dtypes=("float32", "float16"),
    quantization=("MatMulNBits", "dynamic int8"),
    adapter_api=True,
    io_binding=True,
    mixed_rows=True,
    seen="every test, on x86-64 Linux; a small graph, on ARM64 in an emulator",
    notes=(
        "The fused form is the faster one.",
        "It computes much of a graph in float16 in float32.",
    ),
)
OPENVINO = _portable(
    "openvino",
    "Intel CPUs, GPUs and NPUs, by OpenVINO",
    "OpenVINOExecutionProvider",
    packages=(
        Package("onnxruntime-openvino"),
        Package("onnxruntime-ep-openvino", beside=True),
    ),
    zero_size=True,
    dtypes=("float32", "float16"),
    io_binding=True,
    mixed_rows=True,
    quantization=("MatMulNBits",),
    seen="onnxruntime-openvino 1.24.1 on a CPU: the golden cases of fused, portable, int4, float16 "
    "and merged bundles and classifiers; of the portable form all nodes on OpenVINO",
    notes=("GroupQueryAttention of the fused form is left to the CPU.",),
)

QNN = Target(
    "qnn",
    "Qualcomm's NPUs",
    "QNNExecutionProvider",
    packages=(Package("onnxruntime-qnn", beside=True),),
    device="the first NPU, GPU or CPU that the package lists; option device chooses another",
    forms=("portable",),
    dynamic_shapes=False,
    runtime_weights=True,
    dtypes=("float16",),
    quantization=("QDQ",),
    mixed_rows=True,
    options=("backend_path", "soc_model", "htp_arch"),
    seen="onnxruntime-qnn 2.7.0 on its emulator: all of 290 nodes of a graph with fixed shapes, "
    "whose golden cases it runs in float16; 24 of 320 of one with dynamic shapes",
    notes=(
        "lora-edge sets backend_path to the HTP of onnxruntime-qnn, and on x86-64, where that is "
        "an emulator, soc_model=69 and htp_arch=75, unless a backend is given.",
        "It computes a graph of float32 in float16: validate --in qnn judges that apart.",
    ),
)

PROVIDERS = (
    CPU,
    Target(
        "cuda",
        "NVIDIA GPUs, by CUDA",
        "CUDAExecutionProvider",
        packages=(_GPU,),
        device="the GPU of number device_id, else number 0; CUDA and cuDNN must be where the "
        "system's loader finds them",
        memory="cuda",
        options=("device_id", "gpu_mem_limit"),
        notes=("onnxruntime-gpu 1.31.1 needs cuDNN 9 and CUDA 13.",),
    ),
    _portable(
        "coreml",
        "Apple's Neural Engine, GPUs and CPUs, by Core ML",
        "CoreMLExecutionProvider",
        packages=(Package("onnxruntime", systems=("Darwin",)), IOS),
        device="what Core ML chooses; MLComputeUnits narrows it",
        defaults=(("ModelFormat", "MLProgram"),),
        options=(
            "ModelFormat",
            "MLComputeUnits",
            "RequireStaticInputShapes",
            "ModelCacheDirectory",
        ),
        seen="ONNX Runtime's usability checker, on a portable graph with fixed shapes: 280 of 290 "
        "nodes as MLProgram; left over CumSum, Gather, Greater and Neg",
        notes=(
            "ModelFormat NeuralNetwork multiplies by constant weights only.",
            "By ONNX Runtime's documentation it takes dynamic shapes, and may be slower on them.",
        ),
    ),
    Target(
        "directml",
        "GPUs on Windows, by DirectX 12",
        "DmlExecutionProvider",
        packages=(Package("onnxruntime-directml", systems=("Windows",)),),
    ),
    Target(
        "migraphx",
        "AMD GPUs, by MIGraphX",
        "MIGraphXExecutionProvider",
        packages=(Package("onnxruntime-migraphx"),),
    ),
    Target(
        "nnapi",
        "accelerators of Android, by its Neural Networks API",
        "NnapiExecutionProvider",
        packages=(ANDROID,),
        device="what Android chooses",
        forms=("portable",),
        dynamic_shapes=False,
        seen="ONNX Runtime's usability checker, on a portable graph with fixed shapes: 284 of 290 "
        "nodes",
    ),
    OPENVINO,
    QNN,
    Target(
        "tensorrt",
        "NVIDIA GPUs, by TensorRT",
        "TensorrtExecutionProvider",
        packages=(_GPU,),
        device="the GPU of number device_id, else number 0; CUDA, cuDNN and TensorRT must be where "
        "the system's loader finds them",
        memory="cuda",
    ),
    _portable(
        "webgpu",
        "GPUs, by WebGPU outside of a browser",
        "WebGpuExecutionProvider",
        packages=(Package("onnxruntime-webgpu"), Package("onnxruntime-ep-webgpu", beside=True)),
        zero_size=False,
        dtypes=("float32",),
        seen="onnxruntime-webgpu 1.27.0 on a GPU in software: the portable form within 2e-4 of the "
        "CPU; the fused form is right for four positions and wrong from the fifth on",
    ),
    Target(
        "xnnpack",
        "CPUs of phones, by XNNPACK",
        "XnnpackExecutionProvider",
        packages=(ANDROID, IOS),
        runtime_weights=False,
        options=("intra_op_num_threads",),
        notes=(
            "By ONNX Runtime's source, it multiplies by constant weights only: it leaves the "
            "adapters of a switchable bundle to the CPU, and the attention of any.",
        ),
    ),
)
"""Every execution provider that is known by a short name; the CPU first."""


def provider(name: str) -> Target | None:
    """The provider of a short name or of ONNX Runtime's own name, in any case; None if unknown."""
    return next((each for each in PROVIDERS if each.called(name)), None)


def unknown(ort_name: str) -> Target:
    """The target of a provider that is not in the table: nothing is taken for granted."""
    return Target(ort_name.removesuffix(SUFFIX).lower(), ort_name, ort_name)
