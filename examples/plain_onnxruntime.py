"""A bundle's adapter files with plain onnxruntime, without lora-edge: one forward pass.

python examples/plain_onnxruntime.py BUNDLE NAME 12 7 93     # the adapter, and token ids

For bundles that generate text. Needs numpy and onnxruntime.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def run_with_adapter(
    session: Any, file: Path, outputs: list[str], feeds: dict[str, Any]
) -> list[Any]:
    """``session.run`` with the tensors of a ``.onnx_adapter`` file as the adapter's inputs.

    ``InferenceSession.run`` asks for every input before it looks at adapters; the session below it,
    ``session._sess``, does not. The adapter must outlive the run, which does not keep it alive.
    """
    adapter = ort.LoraAdapter()
    adapter.Load(str(file))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    found: list[Any] = session._sess.run(outputs, feeds, options)
    return found


def logits(bundle: Path, name: str, ids: list[int]) -> Any:
    """The logits ``[vocab]`` after the last token, with the adapter; ``none`` is the base."""
    manifest = json.loads((bundle / "lora_edge.json").read_text(encoding="utf-8"))
    part = manifest["parts"]["decoder"]
    session = ort.InferenceSession(str(bundle / part["file"]), providers=["CPUExecutionProvider"])
    known = {node.name for node in session.get_inputs()}
    feeds: dict[str, Any] = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        "num_logits_to_keep": np.array(1, np.int64),
    }
    cache, half = part["cache"], manifest["precision"] == "fp16"
    kind = np.float16 if half else np.float32
    past = np.zeros((1, cache["kv_heads"], 0, cache["head_dim"]), kind)
    for layer in range(cache["layers"]):
        feeds |= {f"past_key_values.{layer}.{part}": past for part in ("key", "value")}
    feeds = {key: value for key, value in feeds.items() if key in known}
    file = bundle / manifest["adapters"][name]["half" if half else "file"]
    return run_with_adapter(session, file, ["logits"], feeds)[0][0, -1]


if __name__ == "__main__":
    folder, adapter, *tokens = sys.argv[1:]
    print(int(np.argmax(logits(Path(folder), adapter, [int(token) for token in tokens]))))
