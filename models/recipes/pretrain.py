"""Make ``models/tiny-llama`` from nothing: ``python models/recipes/pretrain.py [DIRECTORY]``.

A Llama decoder of 1.0 M parameters on bytes, trained on the text of ``text.py`` with
``transformers.Trainer`` (seeded, CPU, minutes). Prints what was learnt, against the entropies of
the text.

The loss also holds attention's scores and the logits small. A softmax turns an absolute error of a
score into a relative error of a weight, and the error in float32 grows with the score: else
scores reach 100, and PyTorch in float32 is 1e-4 from PyTorch in float64 on the logits.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import text
import torch
from options import recipe_options, training_arguments
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    set_seed,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

BLOCK = 128
SCORE_WEIGHT, SCORE_ROWS = 2e-2, 8  # weight of the scores' mean square, rows that it is taken from
LOGIT_WEIGHT = 3e-4  # weight of the logits' mean square
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """256 byte tokens without merges, then the special tokens; ``<|bos|>`` is put in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in text.SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{text.BOS} $A",
        pair=f"{text.BOS} $A {text.BOS} $B",
        special_tokens=[(text.BOS, tokenizer.token_to_id(text.BOS))],
    )
    return tokenizer


def blocks(tokenizer: Tokenizer, seed: int, count: int, *, held_out: bool = False) -> np.ndarray:
    """``[count, BLOCK] int64``: documents one after the other, cut into blocks."""
    ids: list[int] = []
    for document in text.documents(seed, held_out=held_out):
        ids += tokenizer.encode(document, add_special_tokens=False).ids
        if len(ids) >= count * BLOCK:
            return np.array(ids[: count * BLOCK], np.int64).reshape(count, BLOCK)
    raise AssertionError("the stream of documents is endless")


def entropies(train: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """Nats per token of the held-out text under the training text's unigrams and bigrams."""
    seen, after = Counter(train.ravel().tolist()), Counter(pairwise(train.ravel().tolist()))
    unigram = -np.mean([math.log((seen[t] + 1) / (train.size + 264)) for t in held_out.ravel()])
    bigram = -np.mean(
        [math.log((after[a, b] + 0.1) / (seen[a] + 26.4)) for a, b in pairwise(held_out.ravel())]
    )
    return float(unigram), float(bigram)


def make_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """3 layers, hidden 192, 6 heads of 32 over 2 key/value heads, tied embeddings."""
    token = tokenizer.token_to_id
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=token(text.BOS),
        eos_token_id=token(text.EOS),
        pad_token_id=token(text.PAD),
    )
    return LlamaForCausalLM(config)


class SmallScores(Trainer):
    """Trains with small attention scores and logits; evaluates the plain loss."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._squares: list[torch.Tensor] = []
        AttentionInterface.register("small_scores", self._attention)
        self.model.set_attn_implementation("small_scores")

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        keys = repeat_kv(key[:SCORE_ROWS], module.num_key_value_groups)
        scores = query[:SCORE_ROWS] @ keys.transpose(2, 3) * module.scaling
        self._squares.append(scores.tril().square().mean())
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        self._squares.clear()
        out = model(**inputs)
        loss = out.loss
        if model.training:
            loss = loss + SCORE_WEIGHT * torch.stack(self._squares).mean()
            loss = loss + LOGIT_WEIGHT * out.logits.square().mean()
        return (loss, out) if return_outputs else loss


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the float32 model and the tokenizer in files that transformers 4.57 and 5 both read."""
    token = tokenizer.token_to_id
    model.generation_config = GenerationConfig(
        bos_token_id=token(text.BOS),
        eos_token_id=[token(text.EOS), token(text.END)],
        pad_token_id=token(text.PAD),
    )
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "use_cache": True}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text.BOS,
        "eos_token": text.EOS,
        "pad_token": text.PAD,
        "model_max_length": model.config.max_position_embeddings,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n")


def main() -> None:
    options = recipe_options(
        __doc__, "tiny-llama", "out/pretrain", steps=1000, batch_size=32, lr=4e-3
    )
    set_seed(options.seed)
    started = time.monotonic()
    tokenizer = make_tokenizer()
    train = blocks(tokenizer, options.seed, options.steps * options.batch_size)
    held_out = blocks(tokenizer, options.seed, 64, held_out=True)
    model = make_model(tokenizer)
    trainer = SmallScores(
        model=model,
        args=training_arguments(
            options,
            per_device_eval_batch_size=64,
            warmup_steps=50,
            weight_decay=0.3,
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=200,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in torch.from_numpy(train)],
        eval_dataset=[{"input_ids": row, "labels": row} for row in torch.from_numpy(held_out)],
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    unigram, bigram = entropies(train, held_out)
    save(model.eval(), tokenizer, options.directory)
    print(f"parameters           {model.num_parameters():,}")
    print(f"training tokens      {train.size:,}")
    print(f"held-out loss        {loss:.3f} nats/token")
    print(f"unigram entropy      {unigram:.3f} nats/token")
    print(f"bigram entropy       {bigram:.3f} nats/token")
    print(f"seconds              {time.monotonic() - started:.0f}")


if __name__ == "__main__":
    sys.exit(main())
