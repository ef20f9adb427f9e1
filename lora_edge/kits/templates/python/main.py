"""Generates text with a bundle: python main.py "A prompt" --adapter NAME.

Needs numpy, onnxruntime and tokenizers; no lora-edge and no PyTorch. The most likely token is taken
each time, so that the same prompt gives the same text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

BUNDLE = Path(__file__).parent / "bundle"
NONE = "none"


class Model:
    """A bundle's graph, its adapters and its tokenizers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "lora_edge.json").read_text(encoding="utf-8"))
        self.part = self.manifest["parts"]["decoder"]
        self.merged = self.manifest["mode"] == "merged"
        self.half = self.manifest["precision"] == "fp16"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(
            str(folder / self.part["file"]), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {node.name for node in self.session.get_inputs()}
        self.outputs = [node.name for node in self.session.get_outputs()]

    @property
    def adapters(self) -> list[str]:
        """The names that ``--adapter`` takes."""
        return sorted(self.manifest["adapters"])

    def tokenizer(self, adapter: str) -> Tokenizer:
        """The adapter's own tokenizer, or the base's."""
        own = self.folder / "adapters" / adapter / "text" / "tokenizer.json"
        found = Tokenizer.from_file(str(own if own.is_file() else self.folder / "tokenizer.json"))
        found.no_truncation()
        found.no_padding()
        return found

    def ends(self, adapter: str) -> set[int]:
        """The tokens that end a text: the model's, and that of the adapter's own tokenizer."""
        own = set()
        if "tokenizer" in self.manifest["adapters"][adapter]["text"]:
            folder = self.folder if self.merged else self.folder / "adapters" / adapter / "text"
            config = read(folder / "tokenizer_config.json")
            if "added_tokens_decoder" not in config:
                config |= read(folder / "special_tokens_map.json")
            end = config.get("eos_token")
            text = end["content"] if isinstance(end, dict) else end
            token = self.tokenizer(adapter).token_to_id(text) if text else None
            own = set() if token is None else {token}
        return self.model_ends() | own

    def model_ends(self) -> set[int]:
        """The tokens that end the model's own texts."""
        for name in ("generation_config.json", "config.json"):
            file = self.folder / name
            if file.is_file():  # the first that is there counts alone
                ids = read(file).get("eos_token_id")
                return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}
        return set()

    def tensors(self, adapter: str) -> dict[str, Any]:
        """The graph's inputs that make the adapter: graph input -> array."""
        if self.merged:
            return {}
        entry = self.manifest["adapters"][adapter]
        file = self.folder / (entry["half"] if self.half else entry["file"])
        found = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
        return {name: value.numpy().copy() for name, value in found.items()}

    def start_of(self, adapter: str, ids: list[int]) -> int:
        """The position from which an adapter is active: 0, but for one that words invoke."""
        words = self.manifest["adapters"][adapter]["invocation"]
        if not words:
            return 0
        places = range(len(ids) - len(words), -1, -1)
        return next((i for i in places if ids[i : i + len(words)] == words), sys.maxsize)

    def generate(self, ids: list[int], adapter: str, most: int) -> Iterator[int]:
        """New tokens behind a prompt, one by one."""
        fixed = self.tensors(adapter)
        begins = self.start_of(adapter, ids)
        ends, longest = self.ends(adapter), self.part["max_length"] or sys.maxsize
        cache = self.part["cache"]
        empty = np.zeros(
            (1, cache["kv_heads"], 0, cache["head_dim"]), np.float16 if self.half else np.float32
        )
        names = [f"{i}.{part}" for i in range(cache["layers"]) for part in ("key", "value")]
        past = {f"past_key_values.{name}": empty for name in names}
        new, length = ids, 0
        for _ in range(min(most, longest - len(ids) + 1)):
            places = np.arange(length, length + len(new))
            length += len(new)
            feeds = {
                **past,
                **(gated(fixed, places >= begins) if begins else fixed),
                "input_ids": np.array([new], np.int64),
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": places[None].astype(np.int64),
                "num_logits_to_keep": np.array(1, np.int64),
            }
            feeds = {name: value for name, value in feeds.items() if name in self.inputs}
            found = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
            token = int(found["logits"][0, -1].argmax())
            if token in ends:
                return
            yield token
            past = {f"past_key_values.{name}": found[f"present.{name}"] for name in names}
            new = [token]


def read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def gated(tensors: dict[str, Any], active: Any) -> dict[str, Any]:
    """An adapter's inputs, with 0 in its gates where it is not active yet."""
    found = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(".gate") or name == "lora.select":
            found[name] = (value * active[None, :, None]).astype(value.dtype)
    return found


def main() -> None:
    """Print the text that follows a prompt, as it comes."""
    model = Model(BUNDLE)
    parser = argparse.ArgumentParser(description="Generates text with a bundle.")
    parser.add_argument("prompt")
    parser.add_argument(
        "--adapter",
        choices=model.adapters,
        default=model.adapters[0] if model.merged else NONE,
        help="default: %(default)s",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    given = parser.parse_args()
    tokenizer = model.tokenizer(given.adapter)
    ids = tokenizer.encode(given.prompt).ids
    longest = model.part["max_length"] or sys.maxsize
    if not ids:
        parser.error("the prompt is empty")
    if len(ids) > longest:
        parser.error(f"the prompt has {len(ids)} tokens, and the model reads {longest}")
    found: list[int] = []
    shown = ""
    for token in model.generate(ids, given.adapter, given.max_new_tokens):
        found.append(token)
        text = tokenizer.decode(found)
        # A letter may be made of several tokens: until it is whole, it ends in this sign.
        if text.startswith(shown) and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(found).removeprefix(shown))


if __name__ == "__main__":
    main()
