"""Which task a bundle is for: what its adapters were trained for, else what the base is.

Knows adapters and bases; knows nothing of graphs or PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lora_edge.adapter import Adapter
from lora_edge.base import Base
from lora_edge.errors import AdapterError
from lora_edge.refusals import Mode
from lora_edge.tasks import TEXT_GENERATION, Task

_TASK_OF_TYPE = {
    "CAUSAL_LM": TEXT_GENERATION,
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "feature-extraction",
    "IMAGE_CLASSIFICATION": "image-classification",
}
_TASK_OF_ARCHITECTURE = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": TEXT_GENERATION,
    "LMHeadModel": TEXT_GENERATION,
}


def chosen_task(
    base: Base, adapters: Sequence[Adapter], asked: str | None, mode: Mode
) -> Task | None:
    """The task of a bundle; ``None`` for text generation.

    Raises:
        AdapterError: the adapters are for different tasks, or the base lacks a task head and an
            adapter does not bring one.
        BaseModelError: the task is unknown.
    """
    known = {**_TASK_OF_TYPE, "SEQ_2_SEQ_LM": _seq2seq_task(base)}
    types = {known.get(str(a.config.get("task_type"))) for a in adapters} - {None}
    if asked is None and len(types) > 1:
        raise AdapterError(
            f"the adapters are for different tasks: {', '.join(sorted(map(str, types)))}",
            "Export them in bundles of their own, or say which with --task.",
        )
    name = asked or next(iter(types), None) or _task_of(base)
    if name == TEXT_GENERATION:
        return None
    saved = [x for adapter in adapters for x in adapter.config.get("modules_to_save") or ()]
    plain = Task(name)
    if plain.seq2seq:
        return plain
    task = dataclasses.replace(plain, heads=tuple(dict.fromkeys((*plain.heads, *saved))))
    if task.output != "logits":
        return task
    counts = {adapter.name: adapter.head_labels(task.in_head) for adapter in adapters}
    own_head = any(map(task.in_head, base.keys()))
    headless = [name for name, count in counts.items() if count is None]
    if not own_head and (headless or not counts):
        raise AdapterError(
            f"{base.name_or_path} has no task head, and "
            + (f"adapter {headless[0]} brings none" if headless else "no adapter brings one"),
            "Without its head the outputs would be random: save the adapter with "
            "modules_to_save=['classifier'] (or what the head is called).",
        )
    brought = [count for count in counts.values() if count is not None]
    if brought and (mode == "merged" or not own_head):
        task = dataclasses.replace(task, num_labels=brought[0])
    return task


def _task_of(base: Base) -> str:
    architecture = str((base.config.get("architectures") or [""])[0])
    for ending, task in _TASK_OF_ARCHITECTURE.items():
        if architecture.endswith(ending):
            return task
    if base.config.get("is_encoder_decoder"):
        return _seq2seq_task(base)
    encoder = architecture.endswith("Model") and not base.config.get("is_decoder")
    bidirectional = "bert" in base.model_type or base.model_type in ("vit", "deit", "dinov2")
    return "feature-extraction" if encoder and bidirectional else TEXT_GENERATION


def _seq2seq_task(base: Base) -> str:
    """The task of an encoder-decoder: of speech where its inputs have mels."""
    speech = "num_mel_bins" in base.config or "input_feat_per_channel" in base.config
    return "automatic-speech-recognition" if speech else "text2text-generation"
