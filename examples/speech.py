"""Speech: a Whisper and a LoRA to a bundle of two graphs, and features to tokens.

python examples/speech.py [WHISPER ADAPTER]      # folders; else a tiny random model is made

A random model says nothing that means anything; the bundle still says what PyTorch says. Needs
lora-edge[cpu,optimum] (transformers 4.57) to export, and lora-edge[cpu] to run.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import lora_edge


def make_random(folder: Path) -> tuple[Path, Path]:
    """A Whisper of two layers, and an adapter that changes something."""
    import peft
    import transformers

    transformers.set_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 56)
    tokens = {"decoder_start_token_id": 3} | dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), 2
    )
    config = transformers.WhisperConfig(
        vocab_size=131, d_model=32, num_mel_bins=16, max_source_positions=20,
        max_target_positions=48, init_std=0.2, suppress_tokens=None, begin_suppress_tokens=None,
        **sizes, **tokens,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    model.save_pretrained(folder / "whisper")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder / "whisper", folder / "adapter"


def main(folder: Path) -> None:
    base, adapter = map(Path, sys.argv[1:3]) if len(sys.argv) > 2 else make_random(folder)
    bundle = lora_edge.export(base, {"accent": adapter}, output=folder / "b", backend="optimum")
    mels, frames = bundle.manifest.reads.sample
    print(f"{bundle.manifest.task}: features [batch, {mels}, {frames}]")

    # Features are yours to compute, with transformers' WhisperFeatureExtractor for one.
    features = np.random.default_rng(0).standard_normal((2, mels, frames)).astype(np.float32)
    runner = lora_edge.Runner(bundle)
    for state in (None, "accent"):
        print(state or "no adapter", runner.generate_ids(features, state, max_new_tokens=8))
    print("proved:", bundle.adapter("accent").proved)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
