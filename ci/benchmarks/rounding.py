"""What ways of rounding cost a real model: KL, best tokens and perplexity on texts, without ONNX.

usage: rounding.py BASE TEXT…   (a Hugging Face folder, and files, of which 900 characters)
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lora_edge.maths.quantization import BLOCK_SIZE, Quantization

_CHARACTERS = 900
WAYS: list[tuple[int | None, int | None, dict[str, Any]]] = [
    *itertools.product((4, None), (8, 4, None), [{}]),
    (8, 8, {}),
    *((4, 8, {"block_size": size}) for size in (16, 64, 128)),
    (4, 8, {"symmetric": True}),
    (4, 8, {"algorithm": "k-quant"}),
]


def main(base: str, texts: list[str]) -> None:
    """Print a line of JSON for each way: bits of the linear layers, of the vocabulary, the rest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    words = [Path(text).read_text(encoding="utf-8")[:_CHARACTERS] for text in texts]
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in words]
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    ends = {id(x.weight) for x in (model.get_input_embeddings(), model.get_output_embeddings())}

    def outputs() -> list[torch.Tensor]:
        return [torch.log_softmax(model(row).logits[0], -1) for row in rows]

    def perplexity(found: list[torch.Tensor]) -> float:
        pairs = zip(found, rows, strict=True)
        losses = [-x[:-1].gather(1, row[0, 1:, None]).mean().item() for x, row in pairs]
        return float(np.exp(np.mean(losses)))

    reference = outputs()
    for linear, vocabulary, how in WAYS:
        errors, size = [], 0
        for name, value in model.named_parameters():
            value.copy_(own[name])
            bits = vocabulary if id(value) in ends else linear
            if value.ndim != 2 or bits is None:
                size += value.numel() * 4
                continue
            weight = own[name].numpy()
            made = Quantization(bits, how.get("block_size", BLOCK_SIZE), ())
            blocks = Quantization(**(vars(made) | how)).blocks(name, weight)
            rounded = blocks.weight()
            errors.append(float(np.linalg.norm(rounded - weight) / np.linalg.norm(weight)))
            size += sum(array.nbytes for array in blocks.packed().values())
            value.copy_(torch.from_numpy(rounded))
        found = outputs()
        pairs = list(zip(reference, found, strict=True))
        figures = {
            "linear": linear,
            "vocabulary": vocabulary,
            **how,
            "error": float(np.mean(errors)) if errors else 0.0,
            "kl": float(np.mean([(r.exp() * (r - x)).sum(-1).mean() for r, x in pairs])),
            "top1": float(
                np.mean([(r.argmax(-1) == x.argmax(-1)).float().mean() for r, x in pairs])
            ),
            "perplexity": perplexity(found),
            "bytes": size,
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], sys.argv[2:])
