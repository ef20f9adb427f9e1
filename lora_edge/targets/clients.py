"""One table of the clients: programs and libraries that bring ONNX Runtime and run a bundle."""

from __future__ import annotations

from functools import partial

from lora_edge.targets.target import ANDROID, IOS, Package, Target

_client = partial(
    Target,
    forms=("fused", "portable"),
    dynamic_shapes=True,
    runtime_weights=True,
    dtypes=("float32", "float16"),
    quantization=("MatMulNBits",),
)
_ALL = "the golden cases of fused, portable, int4, float16 and merged bundles"
_NO_FILES = "It reads no .onnx_adapter file: the driver reads it, and feeds its tensors."

GENAI = _client(
    "genai",
    "onnxruntime-genai",
    packages=(Package("onnxruntime-genai"),),
    device="that of the providers in genai_config.json; a bundle's names none, which is the CPU",
    adapter_api=True,
    tasks=("text-generation",),
    seen=f"onnxruntime-genai 0.18 on the CPU: {_ALL}",
    notes=(
        'og.Adapters loads the bundle\'s files; "no adapter" is the adapter none.',
        "Its tokenizer drops the first token that a model asks for, until "
        'update_options(add_special_tokens="true").',
    ),
)
WEB = _client(
    "web",
    "ONNX Runtime Web in a browser, on WebAssembly or WebGPU",
    packages=(Package("onnxruntime-web", "npm"),),
    device="what the page names: wasm or webgpu",
    zero_size=False,
    adapter_api=False,
    mixed_rows=True,
    seen=f"onnxruntime-web 1.30 in Chromium, on WebAssembly: {_ALL} and classifiers; on WebGPU in "
    "software: logits of a portable bundle within 4e-3 of the CPU",
    notes=(
        "WebAssembly takes zero-size dimensions, WebGPU throws: rank 0 has to be zeros of rank 1.",
        "On WebGPU in software the fused form is wrong in prompts of 32 tokens and more; the "
        "portable form is less exact than the limits of validate.",
        _NO_FILES,
    ),
)
TRANSFORMERS_JS = _client(
    "transformers.js",
    "transformers.js in Node or a browser",
    packages=(Package("@huggingface/transformers", "npm"),),
    adapter_api=False,
    seen=f"transformers.js 4.3 in Node, and in Chromium on WebAssembly: {_ALL} and classifiers",
    notes=("Adapters reach the session by wrapping model.forward.",),
)
NODE = _client(
    "node",
    "ONNX Runtime in Node",
    packages=(Package("onnxruntime-node", "npm"),),
    zero_size=True,
    mixed_rows=True,
    seen=f"onnxruntime-node 1.30 on the CPU: {_ALL} and classifiers",
    notes=(_NO_FILES,),
)
MOBILE = Target(
    "mobile",
    "ONNX Runtime in apps for Android and iOS",
    packages=(ANDROID, IOS, Package("onnxruntime-react-native", "npm")),
    device="what the app names: the CPU, nnapi, coreml or xnnpack",
    forms=("fused", "portable"),
    seen="on a computer: the fused graph in ONNX Runtime's .ort format, equal to the ONNX file",
    notes=(
        "The CPU of a phone takes either form; nnapi and coreml take the portable one.",
        "Java has a call for .onnx_adapter files. Objective-C has none, and no float16 tensors: "
        "there the app reads the files, and feeds their tensors.",
    ),
)

CLIENTS = (GENAI, WEB, TRANSFORMERS_JS, NODE, MOBILE)
"""Every client that is known."""
