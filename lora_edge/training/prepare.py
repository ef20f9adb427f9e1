"""Data and a base -> tokenized examples and a model with fresh factors, all checks made.

Everything that can be refused is refused here, before the first step.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_edge.adapter.refusals import Mode, Refusal
from lora_edge.base.checkpoint import Base
from lora_edge.base.families import refuse_unloadable, refuse_untraceable
from lora_edge.errors import AdapterError, BaseModelError, DataError, UnsupportedModelError
from lora_edge.fit.inspect import mode_refusals
from lora_edge.tasks.task import Task
from lora_edge.training.batches import collate, size_of
from lora_edge.training.data import ChatExample, DataFile, Example, LabelledExample, Row
from lora_edge.training.devices import processes
from lora_edge.training.head import TargetHead, agrees
from lora_edge.training.images import Pixels
from lora_edge.training.loop import Batches, steps_of
from lora_edge.training.lora import add_lora, save_adapter
from lora_edge.training.model import load_model, load_tokenizer
from lora_edge.training.settings import CONVERTED_INITS, Settings
from lora_edge.training.sharding import check_whole
from lora_edge.training.tokens import (
    ClassifiedExample,
    ImageExample,
    PackedExample,
    Tokenized,
    TokenizedExample,
    classify,
    pack,
    tokenize,
)

_DEFAULT_LENGTH = 1024
_APART = 1e-4  # float32 sums in another order make about 1e-6, in bfloat16 1e-2
_APART_HALF = 5e-2


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Attributes:
        model: PEFT's wrapper around the base, on the device.
        task: ``None`` for a generator.
        examples: what is trained on, before packing.
        rows: the same, packed where the settings say so.
        evaluation: what is evaluated on.
        batches: makes batches of examples.
        head: computes the output head on targets only, where the architecture allows that.
        dropped: how many examples were left out, having no target.
        base: what is trained on.
    """

    model: Any
    task: Task
    examples: Sequence[Tokenized]
    rows: Sequence[Tokenized]
    evaluation: Sequence[Tokenized]
    batches: Batches
    head: TargetHead | None
    dropped: int
    base: Base


def task_of(source: DataFile) -> Task:
    """The task that data is for: a classifier, or a generator of text."""
    if source.kind == "image":
        return Task("image-classification", len(source.labels))
    return Task("text-classification", len(source.labels)) if source.labels else Task()


def prepare(
    base: Base,
    source: DataFile,
    evaluation: DataFile | None,
    settings: Settings,
    device: str,
    notify: Callable[[str], None],
) -> Prepared:
    """Tokenize, report on lengths, load the base, add the factors, check what can go wrong.

    Args:
        base: the model.
        source: the data.
        evaluation: other data to evaluate on.
        settings: what is trained, and how.
        device: ``cpu`` or ``cuda``.
        notify: called with one-line remarks.

    Raises:
        DataError: data that cannot be used.
        BaseModelError: a base that cannot be used.
        AdapterError: options that cannot be meant.
    """
    from transformers import set_seed

    task = task_of(source)
    check_whole(settings, classifies=not task.causal)
    if evaluation is not None and evaluation.kind != source.kind:
        raise DataError(
            f"{evaluation.path} holds {evaluation.kind} data, and {source.path} {source.kind} data",
            "Evaluate on the kind of data that is trained on.",
        )
    if settings.packing and not task.causal:
        raise AdapterError(
            "packing is set, and a classifier reads one text at a time", "Leave it out."
        )
    kept, held = _split(source, settings) if evaluation is None else (source.rows, evaluation.rows)
    encode = _Encoder(base, source, settings, task)
    dropped: list[str] = []
    examples = encode(kept, dropped.append)
    evaluated = encode(held, dropped.append) if held else ()
    if dropped:
        notify(f"left out {len(dropped)} examples without a target: {dropped[0]} …")
    rows: Sequence[Tokenized] = examples
    if settings.packing:
        texts = [example for example in examples if isinstance(example, TokenizedExample)]
        rows = pack(texts, _max_length(base, settings))
    _remark(examples, rows, evaluated, settings, _max_length(base, settings), notify)
    model = load_model(base, task, settings.base_format)
    set_seed(settings.seed)
    wrapped = add_lora(model, settings, base.name_or_path, task)
    model.config.use_cache = False
    batches = encode.batches
    if not task.causal and getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = batches.pad_id  # by which a decoder finds a row's last token
    if settings.base_format != "4bit":  # which is loaded onto its device, and cannot be moved
        wrapped.to(device)
    head = None
    if task.causal and not settings.full_logits:
        head = _target_head(wrapped, examples, batches, notify)
    if settings.packing:
        _check_packing(wrapped, rows, batches, base)
    # The probes must leave no trace in the run's random numbers.
    set_seed(settings.seed)
    return Prepared(wrapped, task, examples, rows, evaluated, batches, head, len(dropped), base)


def export_modes(
    prepared: Prepared, settings: Settings, directory: Path
) -> Mapping[Mode, tuple[Refusal, ...]]:
    """For each mode of export, the reasons why it would refuse what this run will make.

    The adapter as it is now is written to ``directory`` and examined like any other.
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        stage = Path(folder)
        save_adapter(prepared.model, stage, settings, None)
        return mode_refusals(stage, prepared.base, prepared.task.name)


def base_refusal(base: Base, task: Task) -> Refusal | None:
    """Why export's own backend refuses the base's architecture, if it does."""
    try:
        refuse_unloadable(base.config)
        if task.causal:
            refuse_untraceable(base.config)
    except UnsupportedModelError as error:
        return Refusal(str(error), error.hint)
    return None


def keep_start(prepared: Prepared, settings: Settings, directory: Path) -> Path | None:
    """Write the untrained adapter, from which an ``init`` like PiSSA is converted at the end."""
    if settings.init not in CONVERTED_INITS:
        return None
    start = directory / "start"
    start.mkdir()
    save_adapter(prepared.model, start, settings, None)
    return start


class _Encoder:
    """Rows of one kind -> examples for one base."""

    def __init__(self, base: Base, source: DataFile, settings: Settings, task: Task) -> None:
        self._base, self._settings, self._task = base, settings, task
        self._labels = source.labels
        self._length = _max_length(base, settings)
        self._images = source.kind == "image"
        if self._images:
            self.batches = Batches(0, pixels=Pixels(base.directory))
            return
        self._tokenizer = load_tokenizer(base)
        if not task.causal:
            self._length = min(self._length, self._tokenizer.model_max_length)
        pad = self._tokenizer.pad_token_id
        if pad is None:
            pad = self._tokenizer.eos_token_id
        types = "token_type_ids" in self._tokenizer.model_input_names
        self.batches = Batches(0 if pad is None else pad, types)

    def __call__(self, rows: Sequence[Row], drop: Callable[[str], None]) -> tuple[Tokenized, ...]:
        labelled = [row for row in rows if isinstance(row, LabelledExample)]
        if self._images:
            index = {label: number for number, label in enumerate(self._labels)}
            return tuple(ImageExample(row.text, index[row.label]) for row in labelled)
        if not self._task.causal:
            made: tuple[Tokenized, ...] = classify(
                labelled, self._labels, self._tokenizer, self._length
            )
        else:
            texts = [row for row in rows if isinstance(row, (Example, ChatExample))]
            given = drop if self._settings.drop_too_long else None
            made = tokenize(texts, self._tokenizer, self._length, drop=given)
        _check_vocabulary(self._base, made)
        return made


def _split(source: DataFile, settings: Settings) -> tuple[Sequence[Row], Sequence[Row]]:
    """What is trained on and what is kept for evaluation."""
    if not settings.eval_split:
        return source.rows, ()
    count = round(settings.eval_split * len(source.rows))
    if not 0 < count < len(source.rows):
        raise DataError(
            f"eval_split {settings.eval_split} of {len(source.rows)} examples is {count}",
            "Give another share, or a file with --eval.",
        )
    held = set(random.Random(settings.seed).sample(range(len(source.rows)), count))
    kept = [row for index, row in enumerate(source.rows) if index not in held]
    seen = {row.label for row in kept if isinstance(row, LabelledExample)}
    lost = [label for label in source.labels if label not in seen]
    if lost:
        raise DataError(
            f"eval_split leaves no example of the label {lost[0]!r} to train on",
            "Give a smaller share, another --seed, or a file with --eval.",
        )
    return kept, [source.rows[index] for index in sorted(held)]


def _max_length(base: Base, settings: Settings) -> int:
    positions = base.config.get("max_position_embeddings") or base.config.get("n_positions")
    if settings.max_length is None:
        return min(_DEFAULT_LENGTH, positions or _DEFAULT_LENGTH)
    if positions and settings.max_length > positions:
        raise BaseModelError(
            f"max_length is {settings.max_length}, but {base.name_or_path} has "
            f"{positions} positions",
            f"Give --max-length {positions} or less.",
        )
    return settings.max_length


def _check_vocabulary(base: Base, examples: Sequence[Tokenized]) -> None:
    size = base.config.get("vocab_size")
    texts = [x for x in examples if isinstance(x, (TokenizedExample, ClassifiedExample))]
    highest = max((max(example.input_ids) for example in texts), default=0)
    if size is not None and highest >= size:
        raise BaseModelError(
            f"{base.name_or_path}: its tokenizer makes token {highest}, but vocab_size is {size}",
            "The tokenizer belongs to another model, or the embeddings must be resized first.",
        )


def _remark(
    examples: Sequence[Tokenized],
    rows: Sequence[Tokenized],
    evaluated: Sequence[Tokenized],
    settings: Settings,
    length: int,
    notify: Callable[[str], None],
) -> None:
    if isinstance(examples[0], ImageExample):
        notify(f"{len(examples)} images")
    else:
        _remark_lengths(examples, rows, length, notify)
    together = settings.batch_size * settings.accumulate * processes()
    held = f"; evaluated on {len(evaluated)} examples" if evaluated else ""
    notify(
        f"{steps_of(len(rows), settings)} steps of {together} "
        f"{'rows' if settings.packing else 'examples'}{held}"
    )


def _remark_lengths(
    examples: Sequence[Tokenized],
    rows: Sequence[Tokenized],
    length: int,
    notify: Callable[[str], None],
) -> None:
    lengths = sorted(map(size_of, examples))
    targets = target_count(examples)
    notify(
        f"{len(examples)} examples, {sum(lengths)} tokens, "
        + (f"{targets} of them with loss; " if targets else "one label each; ")
        + f"lengths {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}, "
        + f"95 % within {lengths[min(len(lengths) - 1, 95 * len(lengths) // 100)]}"
    )
    cut = cut_counts(examples)
    if cut:
        notify(f"{len(cut)} examples lost their ends to max_length {length} ({sum(cut)} tokens)")
    if len(rows) < len(examples):
        filled = sum(lengths) / (len(rows) * length)
        notify(f"packed into {len(rows)} rows of {length} tokens, {filled:.0%} full")


def target_count(examples: Sequence[Tokenized]) -> int:
    """Tokens that carry loss; 0 for a classifier."""
    return sum(example.targets for example in examples if isinstance(example, TokenizedExample))


def cut_counts(examples: Sequence[Tokenized]) -> list[int]:
    """How many tokens each example lost that lost any."""
    texts = [x for x in examples if isinstance(x, (TokenizedExample, ClassifiedExample))]
    return [example.cut for example in texts if example.cut]


def _target_head(
    model: Any, examples: Sequence[Tokenized], batches: Batches, notify: Callable[[str], None]
) -> TargetHead | None:
    head = TargetHead(model)
    batch = _on(model, collate(examples[:2], batches.pad_id))
    if head.usable and agrees(model, batch, head):
        return head
    notify("this architecture's output head cannot be computed on targets only: computed whole")
    return None


def _check_packing(model: Any, rows: Sequence[Tokenized], batches: Batches, base: Base) -> None:
    """Refuse to pack for a base in which the parts of a row would see each other."""
    packed = [row for row in rows if isinstance(row, PackedExample) and len(row.parts) > 1]
    if not packed:
        return
    was = model.training
    model.eval()
    with torch.no_grad():
        together = _logits(model, packed[0], batches)
        alone = torch.cat([_logits(model, part, batches) for part in packed[0].parts])
    model.train(was)
    spread = float((alone - alone.mean(-1, keepdim=True)).norm())
    error = float((together - alone).norm()) / spread
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    if not error <= (_APART_HALF if half else _APART):
        raise UnsupportedModelError(
            f"{base.name_or_path} (model_type {base.model_type}) does not keep packed examples "
            f"apart: their logits change by {error:.1e} of their spread",
            "Leave out --packing; --group-by-length saves padding too.",
        )


def _logits(model: Any, row: TokenizedExample | PackedExample, batches: Batches) -> torch.Tensor:
    """``[seq, vocab] float32``."""
    batch = _on(model, collate([row], batches.pad_id))
    del batch["labels"]
    logits: torch.Tensor = model(**batch).logits[0].float()
    return logits


def _on(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
