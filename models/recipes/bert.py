"""Make ``models/tiny-bert`` from nothing: ``python models/recipes/bert.py [DIRECTORY]``.

A BERT encoder of 0.6 M parameters with a WordPiece vocabulary of the words and letters of
``text.py``, trained on that text with masked tokens and, for its pooler, on whether a question
belongs to the story before it (seeded, CPU, minutes). Prints what was learnt.
"""

from __future__ import annotations

import json
import random
import re
import string
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import text
import torch
from options import recipe_options, training_arguments
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForPreTraining,
    Trainer,
    TrainerCallback,
    set_seed,
)

PAD, UNKNOWN, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNKNOWN, CLS, SEP, MASK)
POSITIONS = 128
MASKED_SHARE = 0.15
_PUNCTUATION = ".,?!()=:"


def make_tokenizer() -> Tokenizer:
    """WordPiece: special tokens, letters (first and following), the words of the stories."""
    rng = random.Random("vocabulary")
    words = set()
    for _ in range(20_000):
        words |= set(re.findall(r"[A-Za-z]+", " ".join(text.story(rng))))
    letters = string.ascii_lowercase + string.ascii_uppercase
    pieces = [*SPECIAL_TOKENS, *_PUNCTUATION, *letters, *(f"##{letter}" for letter in letters)]
    pieces += sorted(words | set(text.SKILLS), key=lambda word: (len(word), word))
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)],
    )
    return tokenizer


def skill(rng: random.Random, *, held_out: bool) -> str:
    """One letter skill, ``upper(river)=RIVER``."""
    name = rng.choice(tuple(text.SKILLS))
    word = text.word(rng, held_out=held_out)
    return f"{name}({word})={text.SKILLS[name](word)}"


def passages(seed: int, *, held_out: bool = False) -> Iterator[tuple[str, str | None, int]]:
    """An endless stream of ``(text, second text, label)``.

    The label is 0 where the question belongs to the story, 1 where it belongs to another one, and
    -100 (no loss) where there is no second text.
    """
    rng = random.Random(f"bert-{seed}-{held_out}")
    while True:
        kind = rng.random()
        if kind < 0.45:
            lines = (skill(rng, held_out=held_out) for _ in range(rng.randint(1, 2)))
            yield " ".join(lines), None, -100
        elif kind < 0.55:
            yield text.story(rng)[0], None, -100
        else:
            told, question, answer = text.story(rng)
            other = rng.random() < 0.3
            if other:
                _, question, answer = text.story(rng)
            yield told, f"{question} {answer}", int(other)


def rows(tokenizer: Tokenizer, seed: int, count: int, *, held_out: bool = False) -> list[Any]:
    """``count`` encoded passages."""
    stream = passages(seed, held_out=held_out)
    found = []
    for first, second, label in (next(stream) for _ in range(count)):
        coded = tokenizer.encode(first, second) if second else tokenizer.encode(first)
        assert len(coded.ids) <= POSITIONS
        found.append({"ids": coded.ids, "types": coded.type_ids, "label": label})
    return found


class Masking:
    """Pads a batch and masks its tokens; a generator of its own, so that a seed gives the bytes."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary = vocabulary
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: list[Any]) -> dict[str, torch.Tensor]:
        width = max(len(row["ids"]) for row in batch)

        def padded(key: str) -> torch.Tensor:
            return torch.tensor([row[key] + [0] * (width - len(row[key])) for row in batch])

        ids = padded("ids")
        labels = torch.full_like(ids, -100)
        draw = torch.rand(ids.shape, generator=self._generator)
        chosen = (draw < MASKED_SHARE) & (ids >= len(SPECIAL_TOKENS))
        labels[chosen] = ids[chosen]
        masked = ids.masked_fill(chosen & (draw < 0.8 * MASKED_SHARE), SPECIAL_TOKENS.index(MASK))
        random_ids = torch.randint(
            len(SPECIAL_TOKENS), self._vocabulary, ids.shape, generator=self._generator
        )
        swapped = chosen & (draw >= 0.9 * MASKED_SHARE)
        return {
            "input_ids": torch.where(swapped, random_ids, masked),
            "attention_mask": (ids != 0).long(),
            "token_type_ids": padded("types"),
            "labels": labels,
            "next_sentence_label": torch.tensor([row["label"] for row in batch]),
        }


def make_model(tokenizer: Tokenizer) -> BertForPreTraining:
    """4 layers, hidden 128, 4 heads of 32, intermediate 256."""
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return BertForPreTraining(config)


@torch.no_grad()
def accuracies(
    model: BertForPreTraining, held_out: list[Any], masking: Masking
) -> dict[str, float]:
    """Held-out shares: masked tokens met, the commonest token's share, second texts judged."""
    hits = masked = judged = right = 0
    commonest: Counter[int] = Counter()
    model.eval()
    for start in range(0, len(held_out), 64):
        batch = masking(held_out[start : start + 64])
        labels, pairs = batch.pop("labels"), batch.pop("next_sentence_label")
        out = model(**batch)
        here, paired = labels >= 0, pairs >= 0
        hits += int((out.prediction_logits.argmax(-1)[here] == labels[here]).sum())
        masked += int(here.sum())
        commonest.update(labels[here].tolist())
        right += int((out.seq_relationship_logits.argmax(-1)[paired] == pairs[paired]).sum())
        judged += int(paired.sum())
    return {
        "masked tokens met": hits / masked,
        "commonest token": commonest.most_common(1)[0][1] / masked,
        "second texts judged": right / judged,
    }


def save(model: BertForPreTraining, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the float32 model and the tokenizer in files that transformers 4.57 and 5 both read."""
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "cls_token": CLS,
        "sep_token": SEP,
        "pad_token": PAD,
        "mask_token": MASK,
        "model_max_length": POSITIONS,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class _Lines(TrainerCallback):
    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            print(f"step {state.global_step}: loss {float(logs['loss']):.3f}", file=sys.stderr)


def main() -> None:
    options = recipe_options(__doc__, "tiny-bert", "out/bert", steps=3000, batch_size=64, lr=2e-3)
    set_seed(options.seed)
    started = time.monotonic()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    data = rows(tokenizer, options.seed, options.steps * options.batch_size)
    trainer = Trainer(
        model=model,
        args=training_arguments(
            options,
            warmup_steps=options.steps // 20,
            weight_decay=0.01,
            logging_steps=100,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=data,
        data_collator=Masking(tokenizer.get_vocab_size(), options.seed),
        callbacks=[_Lines()],
    )
    trainer.train()
    save(model.eval(), tokenizer, options.directory)
    held_out = rows(tokenizer, options.seed, 2000, held_out=True)
    found = accuracies(model, held_out, Masking(tokenizer.get_vocab_size(), 0))
    print(f"parameters           {model.num_parameters():,}")
    print(f"training tokens      {sum(len(row['ids']) for row in data):,}")
    for name, share in found.items():
        print(f"{name:<20} {share:.1%}")
    print(f"seconds              {time.monotonic() - started:.0f}")


if __name__ == "__main__":
    sys.exit(main())
