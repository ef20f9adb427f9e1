"""A model package with plain onnxruntime 1.32, without lora-edge: one forward pass with an adapter.

python examples/model_package.py PACKAGE NAME 12 7 93     # the adapter, and token ids

For packages of bundles that generate text. Needs numpy and onnxruntime. ONNX Runtime does not
compare shared assets with their hashes: ``lora-edge package --check PACKAGE`` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def logits(package: Path, name: str, ids: list[int]) -> Any:
    """The logits ``[tokens, vocab]`` after each token, with the adapter; ``none`` is the base."""
    context = ort.ModelPackageContext(str(package))
    # The first variant of the execution provider that the options name; here of the CPU.
    chosen = context.select_component("decoder", ort.ModelPackageOptions(ort.SessionOptions()))
    session = chosen.create_session()
    told = json.loads((package / "manifest.json").read_text(encoding="utf-8"))
    variant = told["components"]["decoder"]["variants"][chosen.get_selected_variant_name()]
    uri = variant["executor_info"]["lora_edge"]["adapters"][name]
    adapter = ort.LoraAdapter()
    adapter.Load(context.resolve_string_ref(uri, must_exist=True))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)  # which must outlive the run
    feeds: dict[str, Any] = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        "num_logits_to_keep": np.array(0, np.int64),
    }
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    inputs = {node.name: node for node in session.get_inputs()}
    for key, node in inputs.items():
        if key.startswith("past_key_values."):
            feeds[key] = np.zeros((1, node.shape[1], 0, node.shape[3]), kinds[node.type])
    feeds = {key: value for key, value in feeds.items() if key in inputs}
    found: Any = session._sess.run(["logits"], feeds, options)[0][0]
    return found


if __name__ == "__main__":
    folder, adapter_name, *tokens = sys.argv[1:]
    last = logits(Path(folder), adapter_name, [int(token) for token in tokens])[-1]
    print(int(np.argmax(last)))
