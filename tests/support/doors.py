"""Bundles that other libraries load: ``python -m tests.support.doors FOLDER``.

A program of its own, because BERT is exported with transformers 5, and optimum needs 4.57.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import lora_edge
from tests.support.encoders import make_encoder, make_encoder_adapter
from tests.support.saving import copy_tokenizer
from tests.support.shipped import BERT, CLASSIFIERS, export_heads

Mode = Literal["merged", "switchable"]
MODES: tuple[Mode, ...] = get_args(Mode)
_EMBEDDING = "feature-extraction"


def write(folder: Path, name: str, content: Any) -> None:
    """A JSON file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def pools(folder: Path, mode: str, *more: str, **fields: Any) -> Path:
    """Give a folder the files of sentence-transformers."""
    kinds = ("Transformer", "Pooling", *more)
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    write(folder, "modules.json", modules)
    config = {f"pooling_mode_{name}": name in mode.split() for name in _FLAGS}
    write(folder, "1_Pooling/config.json", {"word_embedding_dimension": 128, **config, **fields})
    return folder


_FLAGS = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")


def _export(base: Path, adapters: dict[str, Path], mode: Mode, output: Path) -> None:
    lora_edge.export(base, adapters, mode, output, task=_EMBEDDING)


def _sentences(root: Path) -> None:
    """A BERT with an own pooling, prompts and lengths; an adapter that brings others."""
    base = Path(shutil.copytree(BERT, root / "base"))
    pools(base, "mean_tokens cls_token", "Normalize", include_prompt=False)
    write(base, "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
    prompts = {"prompts": {"query": "query: river "}, "default_prompt_name": None}
    write(base, "config_sentence_transformers.json", prompts)
    targets = {"one": ["query", "value"], "two": ["key", "output.dense"]}
    adapters = {
        name: make_encoder_adapter(base, _EMBEDDING, root / name, seed=seed, target_modules=wanted)
        for seed, (name, wanted) in enumerate(targets.items(), 1)
    }
    own = Path(shutil.copytree(adapters["two"], root / "own"))
    pools(own, "max_tokens")
    write(own, "sentence_bert_config.json", {"max_seq_length": 9})
    _export(base, {"one": adapters["one"]}, "merged", root / "merged")
    _export(base, {**adapters, "own": own}, "switchable", root / "switchable")
    _export(base, {"own": own}, "merged", root / "own-merged")


def _padded_left(root: Path) -> None:
    """A Llama whose tokenizer pads on the left, as embedding models of this kind do."""
    base = make_encoder("llama", _EMBEDDING, root / "base", vocab_size=264)
    copy_tokenizer(base)
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(base, "tokenizer_config.json", {**settings, "padding_side": "left"})
    pools(base, "lasttoken", word_embedding_dimension=32)
    targets = ["q_proj", "down_proj"]
    adapter = make_encoder_adapter(base, _EMBEDDING, root / "a", target_modules=targets)
    _export(base, {"a": adapter}, "merged", root / "merged")


def _labels(root: Path) -> None:
    """The classifiers that ship."""
    letters = {"letters": CLASSIFIERS["letters"]}
    lora_edge.export(BERT, letters, "merged", root / "merged")
    export_heads(root / "switchable")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, make in (("sentences", _sentences), ("left", _padded_left), ("labels", _labels)):
        (folder / name).mkdir()
        make(folder / name)
