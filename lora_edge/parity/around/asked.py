"""What a bundle is asked around its graph, and its own answers, as JSON-ready values.

An aspect is a name such as ``tokenizer``; its answers are compared with what transformers gives for
the same questions, now or when the goldens were recorded. Imports no PyTorch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.manifest import Manifest
from lora_edge.errors import BundleError, LoraEdgeError
from lora_edge.files.json import read_object
from lora_edge.names import NONE_ADAPTER
from lora_edge.runtime import Runner
from lora_edge.runtime.outputs.image import PROCESSOR_FILE
from lora_edge.runtime.text.corpus import TEXTS
from lora_edge.runtime.text.text import TextStream
from lora_edge.runtime.text.tokenizer import Tokenizer

Answers = dict[str, Any]
"""Aspect -> answers."""

TOKENIZER, CHAT, ENDS, LABELS = "tokenizer", "chat template", "end tokens", "label names"
DEFAULTS = "generation defaults"
OF = " of "
"""Between an aspect and the adapter that brings its own."""
LENGTHS, EMBEDDINGS, IMAGES, GRAPH_FILES = "graph's facts", "embeddings", "images", "graph files"

EMBEDDED = ("Word: river Answer:", "The quick brown fox jumps over 13 lazy dogs.", "a")
PICTURES = ((37, 50), (64, 41), (24, 24))

_MARKS = 24  # special and added tokens that are put into texts
_KEPT = 32  # numbers of an embedding or a picture that are kept


def questions(special: Sequence[str]) -> list[str]:
    """The texts that are tokenized: the corpus, and such with a tokenizer's own tokens in."""
    marks = list(dict.fromkeys(special))[:_MARKS]
    return [*TEXTS, *(f"x{mark} y {mark}z" for mark in marks)]


def picture(index: int) -> NDArray[np.uint8]:
    """A picture of waves and noise, ``[height, width, 3]``."""
    height, width = PICTURES[index]
    random = np.random.default_rng(index)
    y, x = np.mgrid[:height, :width]
    waves = 127 + 120 * np.sin(x[..., None] / (2 + np.arange(3)) + y[..., None] / 5)
    noisy = random.integers(0, 256, (height, width, 3))
    found: NDArray[np.uint8] = np.where((x < width // 2)[..., None], waves, noisy).astype(np.uint8)
    return found


def kept(values: NDArray[np.floating]) -> list[float]:
    """A seeded sample of an array's numbers, always at the same places."""
    flat = values.reshape(-1)
    places = np.random.default_rng(len(flat)).permutation(len(flat))[:_KEPT]
    return [float(x) for x in flat[np.sort(places)]]


def vocabulary(tokens: Mapping[str, int]) -> str:
    """A hash of which token has which id."""
    digest = hashlib.sha256()
    for token, index in sorted(tokens.items(), key=lambda pair: (pair[1], pair[0])):
        digest.update(f"{index}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def stop_of(text: str) -> str:
    """A stop string for a text: two characters of its middle."""
    return text[len(text) // 2 :][:2]


def _streamed(tokenizer: Tokenizer, ids: Sequence[int], stop: str) -> str:
    stream = TextStream(tokenizer.decode, [stop])
    pieces = []
    for index in ids:
        pieces.append(stream.push(index))
        if stream.stopped:
            return "".join(pieces)
    return "".join([*pieces, stream.close()])


def takes_pixels(manifest: Manifest) -> bool:
    """Whether the bundle takes images."""
    return manifest.reads.inputs == ("pixel_values",)


def has_tokenizer(runner: Runner) -> bool:
    """Whether the bundle takes texts and has a tokenizer for them."""
    return (
        not takes_pixels(runner.bundle.manifest)
        and (runner.bundle.directory / "tokenizer.json").is_file()
    )


def takes_images(runner: Runner) -> bool:
    """Whether the bundle takes images and knows how they are prepared."""
    return (
        takes_pixels(runner.bundle.manifest)
        and (runner.bundle.directory / PROCESSOR_FILE).is_file()
    )


def embeds(runner: Runner) -> bool:
    """Whether the bundle makes embeddings of texts."""
    hidden = runner.bundle.manifest.gives.output == "last_hidden_state"
    return hidden and has_tokenizer(runner)


def answers(runner: Runner, asked: Answers) -> Answers:
    """The bundle's answers to the questions that other answers are to.

    An answer that the bundle refuses to give is what it says.
    """
    found: Answers = {}
    for aspect, wanted in asked.items():
        kind, _, adapter = aspect.partition(OF)
        try:
            if adapter:
                found[aspect] = _OF_ADAPTERS[kind](runner.tokenizer_of(adapter), wanted)
            else:
                found[aspect] = _ASPECTS[kind](runner, wanted)
        except LoraEdgeError as error:
            found[aspect] = f"refused: {error}"
    return found


def graph_files(runner: Runner) -> dict[str, str]:
    """Graphs and their data -> sha256."""
    files = runner.bundle.manifest.files
    return {name: entry.sha256 for name, entry in files.items() if name.startswith("onnx/")}


def tokenizer_answers(tokenizer: Tokenizer, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's ids of texts, with and without special tokens, and the texts of the ids."""
    rows = []
    texts = [row["text"] for row in wanted["texts"]]
    for text in texts:
        ids = tokenizer.encode(text)
        plain = tokenizer.encode(text, special_tokens=False)
        back = tokenizer.decode(ids)
        row = {"text": text, "ids": ids, "plain": plain, "back": back}
        if "streamed" in wanted["texts"][0]:
            row["streamed"] = _streamed(tokenizer, ids, "")
            row["stopped"] = _streamed(tokenizer, ids, stop_of(back))
        rows.append(row)
    return {"vocabulary": vocabulary(tokenizer.vocabulary()), "texts": rows}


def _chats(tokenizer: Tokenizer, wanted: Any) -> Any:
    found = []
    for row in wanted:
        try:
            text = tokenizer.chat_text(row["messages"])
        except LoraEdgeError:
            text = None
        found.append({"messages": row["messages"], "text": text})
    return found


def _ends(runner: Runner, _: Any) -> Any:
    return sorted(runner.eos_ids)


def _defaults(runner: Runner, _: Any) -> Any:
    defaults = runner.generation_defaults
    sampling = defaults.sampling
    chosen = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    return {
        **(chosen if sampling.temperature else {"temperature": 0.0}),
        "repetition_penalty": sampling.repetition_penalty,
        "max_new_tokens": defaults.max_new_tokens,
    }


def _labels(runner: Runner, wanted: Any) -> Any:
    """Of the base and of every adapter that was asked for; what manifest and config.json say."""
    entries = runner.bundle.manifest.adapters
    found = {name: list(entries[name].labels) for name in wanted["manifest"]}
    config = read_object(runner.bundle.directory / "config.json", BundleError, "Copy it again.")
    names = config.get("id2label") or {}
    return {"manifest": found, "config.json": [names[key] for key in sorted(names, key=int)]}


def _lengths(runner: Runner, wanted: Any) -> Any:
    return {field: getattr(runner.bundle.manifest.reads, field) for field in wanted}


def _embeddings(runner: Runner, wanted: Any) -> Any:
    found = []
    for row in wanted:
        vector = runner.embed([row["text"]], row["adapter"])[0]
        found.append({**row, "size": len(vector), "values": kept(vector)})
    return found


def _images(runner: Runner, wanted: Any) -> Any:
    found = []
    for row in wanted:
        pixels = runner.outputs.processor([picture(row["picture"])])[0]
        found.append({**row, "shape": list(pixels.shape), "values": kept(pixels)})
    return found


_ASPECTS: Mapping[str, Callable[[Runner, Any], Any]] = {
    TOKENIZER: lambda runner, wanted: tokenizer_answers(runner.tokenizer, wanted),
    CHAT: lambda runner, wanted: _chats(runner.tokenizer, wanted),
    ENDS: _ends,
    DEFAULTS: _defaults,
    LABELS: _labels,
    LENGTHS: _lengths,
    EMBEDDINGS: _embeddings,
    IMAGES: _images,
    GRAPH_FILES: lambda runner, _: graph_files(runner),
}


_OF_ADAPTERS: Mapping[str, Callable[[Tokenizer, Any], Any]] = {
    TOKENIZER: tokenizer_answers,
    CHAT: _chats,
}


def adapters_asked(runner: Runner) -> list[str | None]:
    """Adapters whose embeddings are asked for, the base first where the bundle can be without."""
    if runner.bundle.manifest.mode == "merged":
        return [None]
    return [NONE_ADAPTER, *runner.adapters]
