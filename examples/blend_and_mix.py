"""One graph, several adapters: switched, weighted, blended, and a different one for each row.

python examples/blend_and_mix.py BUNDLE      # a switchable bundle with echo, mirror and shout

README's first command makes such a bundle. Needs lora-edge[cpu]; no PyTorch.
"""

from __future__ import annotations

import sys

import numpy as np

import lora_edge

PROMPT = "Word: river Answer:"
STATES: list[str | dict[str, float] | None] = [
    None,
    "echo",
    "mirror",
    "shout",
    {"shout": 0.5},
    {"echo": 0.5, "mirror": 0.5},
]


def main(bundle: str) -> None:
    runner = lora_edge.Runner(bundle)
    print("one state for the whole batch:")
    for state in STATES:
        (text,) = runner.generate([PROMPT], adapter=state, max_new_tokens=12)
        print(f"  {state!s:<34}{text}")

    print("a state for each row of one batch:")
    prompts = [PROMPT] * len(STATES)
    for state, text in zip(STATES, runner.generate(prompts, STATES, 12), strict=True):
        print(f"  {state!s:<34}{text}")

    # A row of a mixed batch has the logits that it has alone, but for rounding.
    ids = [list(runner.tokenizer.encode(PROMPT))] * len(STATES)
    mixed = runner.logits(ids, adapter=STATES)
    alone = np.concatenate([runner.logits(ids[:1], adapter=state) for state in STATES])
    print(f"largest difference of a logit, mixed against alone: {np.abs(mixed - alone).max():.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
