"""One table of the clients: programs and libraries that bring ONNX Runtime and run a bundle."""

from __future__ import annotations

from lora_edge.targets.target import ANDROID, IOS, Package, Target

_NO_FILES = "It reads no .onnx_adapter file: the driver reads it, and feeds its tensors."

GENAI = Target(
    "genai",
    "onnxruntime-genai",
    packages=(Package("onnxruntime-genai"),),
    device="that of the providers in genai_config.json; a bundle's names none, which is the CPU",
    forms=("fused", "portable"),
    dynamic_shapes=True,
    runtime_weights=True,
    dtypes=("float32",),
    quantization=("MatMulNBits",),
    adapter_api=True,
    tasks=("text-generation",),
    seen="onnxruntime-genai 0.18 on the CPU: fused, portable, int4 and merged equal to ONNX "
    "Runtime",
    notes=(
        'og.Adapters loads the bundle\'s files; "no adapter" is the adapter none.',
        "Its tokenizer drops the first token that a model asks for, until "
        'update_options(add_special_tokens="true").',
    ),
)
WEB = Target(
    "web",
    "ONNX Runtime Web in a browser, on WebAssembly or WebGPU",
    packages=(Package("onnxruntime-web", "npm"),),
    device="what the page names: wasm or webgpu",
    forms=("fused", "portable"),
    dynamic_shapes=True,
    zero_size=False,
    runtime_weights=True,
    dtypes=("float32",),
    quantization=("MatMulNBits",),
    adapter_api=False,
    seen="onnxruntime-web 1.30 in Chromium: WebAssembly within 2e-5 of the CPU, fused, portable, "
    "int4 and classifiers; WebGPU in software within 2e-4, fused and portable",
    notes=(
        "WebAssembly takes zero-size dimensions, WebGPU throws: feed the adapter none.",
        _NO_FILES,
    ),
)
TRANSFORMERS_JS = Target(
    "transformers.js",
    "transformers.js in Node or a browser",
    packages=(Package("@huggingface/transformers", "npm"),),
    forms=("fused", "portable"),
    dynamic_shapes=True,
    runtime_weights=True,
    dtypes=("float32",),
    adapter_api=False,
    seen="transformers.js 4.3 in Node and in Chromium: the tokens of a merged graph",
    notes=("Adapters reach the session by wrapping model.forward.",),
)
NODE = Target(
    "node",
    "ONNX Runtime in Node",
    packages=(Package("onnxruntime-node", "npm"),),
    forms=("fused", "portable"),
    dynamic_shapes=True,
    zero_size=True,
    runtime_weights=True,
    dtypes=("float32",),
    quantization=("MatMulNBits",),
    mixed_rows=True,
    seen="onnxruntime-node 1.30 on the CPU: fused, portable, int4, merged and classifiers equal to "
    "ONNX Runtime in Python; golden cases of batches with an adapter for each row",
    notes=(_NO_FILES,),
)
MOBILE = Target(
    "mobile",
    "ONNX Runtime in apps for Android and iOS",
    packages=(ANDROID, IOS, Package("onnxruntime-react-native", "npm")),
    device="what the app names: the CPU, nnapi, coreml or xnnpack",
    forms=("fused", "portable"),
    seen="on a computer: the fused graph in ONNX Runtime's .ort format, equal to the ONNX file",
    notes=("The CPU of a phone takes either form; nnapi and coreml take the portable one.",),
)

CLIENTS = (GENAI, WEB, TRANSFORMERS_JS, NODE, MOBILE)
"""Every client that is known."""
