"""An encoder: two classifiers with heads of unequal sizes in one graph, and sentence embeddings.

python examples/embeddings_and_classification.py [CLASSIFIERS]     # a bundle; else it is exported

Run from the repository's root. Needs lora-edge[cpu,export]; takes about half a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import lora_edge

BASE = "models/tiny-bert"
HEADS = {name: f"models/classifiers/{name}" for name in ("claims", "letters")}
STORY = "Mia has a red lamp. Mia gives the lamp to Max."


def classify(bundle: Path) -> None:
    # One batch; each row has its own adapter, and so its own head and labels.
    texts = ["stone=enots", "stone=STONE", f"{STORY} Max has the lamp."]
    adapters = ["letters", "letters", "claims"]
    runner = lora_edge.Runner(bundle)
    for text, name, labels in zip(texts, adapters, runner.classify(texts, adapters), strict=True):
        print(f"{name:<8} {labels[0].label:<8} {labels[0].score:.3f}  {text}")


def embed(bundle: Path) -> None:
    texts = [STORY, "Mia has a big lamp. Mia gives the lamp to Max.", "stone=enots"]
    vectors = lora_edge.Runner(bundle).embed(texts)
    vectors /= ((vectors**2).sum(-1, keepdims=True)) ** 0.5
    print("cosine with the first text:", *(f"{x:.3f}" for x in vectors @ vectors[0]))


def main(folder: Path, classifiers: Path | None) -> None:
    if classifiers is None:
        classifiers = folder / "classifiers"
        lora_edge.export(BASE, HEADS, output=classifiers)
    classify(classifiers)
    lora_edge.export(BASE, output=folder / "embeddings", task="feature-extraction")
    embed(folder / "embeddings")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch), Path(sys.argv[1]) if len(sys.argv) > 1 else None)
