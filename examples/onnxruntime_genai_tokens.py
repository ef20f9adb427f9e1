"""A bundle in onnxruntime-genai, without lora-edge: the completion of a prompt under an adapter.

python examples/onnxruntime_genai_tokens.py BUNDLE NAME PROMPT     # none: no adapter

For switchable bundles that generate text. Needs onnxruntime-genai.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime_genai as og


def complete(bundle: Path, name: str, prompt: str, most: int = 64) -> str:
    """At most so many new tokens, greedily."""
    manifest = json.loads((bundle / "lora_edge.json").read_text(encoding="utf-8"))
    model = og.Model(str(bundle))
    adapters = og.Adapters(model)
    # float16 graphs take the copy in float16.
    file = manifest["adapters"][name]["half" if manifest["precision"] == "fp16" else "file"]
    adapters.load(str(bundle / file), name)
    tokenizer = og.Tokenizer(model)
    # It drops the token that begins every text until it is told to add it.
    tokenizer.update_options(add_special_tokens="true")
    prompt_ids = tokenizer.encode(prompt)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(prompt_ids) + most)
    generator = og.Generator(model, parameters)
    generator.set_active_adapter(adapters, name)
    generator.append_tokens(prompt_ids)
    while not generator.is_done():
        generator.generate_next_token()
    return str(tokenizer.decode(generator.get_sequence(0)[len(prompt_ids) :]))


if __name__ == "__main__":
    print(complete(Path(sys.argv[1]), *sys.argv[2:4]))
