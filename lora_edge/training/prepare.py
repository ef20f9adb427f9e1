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
from lora_edge.errors import AdapterError, DataError, UnsupportedModelError
from lora_edge.fit.inspect import mode_refusals
from lora_edge.tasks.task import Task
from lora_edge.training.batches import collate, size_of
from lora_edge.training.data import DataFile, LabelledExample, Row
from lora_edge.training.devices import processes
from lora_edge.training.encoders import encoder_of, max_length
from lora_edge.training.head import TargetHead, agrees
from lora_edge.training.loop import Batches, steps_of
from lora_edge.training.lora import add_lora, save_adapter
from lora_edge.training.model import load_model
from lora_edge.training.settings import CONVERTED_INITS, Settings
from lora_edge.training.sharding import check_whole
from lora_edge.training.tokens import (
    ClassifiedExample,
    ImageExample,
    PackedExample,
    Tokenized,
    TokenizedExample,
    pack,
)

_APART = 1e-4  # float32 sums in another order make about 1e-6, in bfloat16 1e-2
_APART_HALF = 5e-2


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Attributes:
        model: PEFT's wrapper around the base, on the device.
        task: what it is trained for.
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
    check_whole(settings, classifies=bool(source.labels))
    if evaluation is not None and evaluation.kind != source.kind:
        raise DataError(
            f"{evaluation.path} holds {evaluation.kind} data, and {source.path} {source.kind} data",
            "Evaluate on the kind of data that is trained on.",
        )
    encode = encoder_of(base, source, settings)
    if settings.packing and not encode.completes:
        raise AdapterError(
            "packing is set, and a classifier reads one text at a time", "Leave it out."
        )
    kept, held = _split(source, settings) if evaluation is None else (source.rows, evaluation.rows)
    dropped: list[str] = []
    examples = encode(kept, dropped.append)
    evaluated = encode(held, dropped.append) if held else ()
    if dropped:
        notify(f"left out {len(dropped)} examples without a target: {dropped[0]} …")
    rows: Sequence[Tokenized] = examples
    if settings.packing:
        texts = [example for example in examples if isinstance(example, TokenizedExample)]
        rows = pack(texts, max_length(base, settings))
    _remark(examples, rows, evaluated, settings, max_length(base, settings), notify)
    model = load_model(base, task, settings.base_format)
    set_seed(settings.seed)
    wrapped = add_lora(model, settings, base.name_or_path, task)
    model.config.use_cache = False
    batches = encode.batches
    encode.settle(model)
    if settings.base_format != "4bit":  # which is loaded onto its device, and cannot be moved
        wrapped.to(device)
    head = None
    if encode.completes and not settings.full_logits:
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
        refuse_unloadable(base.config, task)
        refuse_untraceable(base.config, task)
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
