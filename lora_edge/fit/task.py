"""Which task a bundle is for: what its adapters were trained for, else what the base is.

Knows adapters and bases; knows nothing of graphs or PyTorch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

from lora_edge.adapter.load import Adapter
from lora_edge.adapter.refusals import Mode
from lora_edge.base.checkpoint import Base
from lora_edge.base.layers import built_layers
from lora_edge.errors import (
    AdapterError,
    BaseModelError,
    MissingDependencyError,
    UnsupportedAdapterError,
    UnsupportedModelError,
)
from lora_edge.tasks.task import SPEECH, TASKS, TEXT2TEXT, TEXT_GENERATION, Task

Notice = Callable[[str], None]

_SEQ2SEQ_TYPE = TASKS[TEXT2TEXT].peft_type
# Of an encoder-decoder, text and speech have one type: the base tells.
_TASK_OF_TYPE = {
    **{x.peft_type: name for name, x in TASKS.items() if x.peft_type not in ("", _SEQ2SEQ_TYPE)},
    "IMAGE_CLASSIFICATION": "image-classification",
}
_TASK_OF_ARCHITECTURE = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForCausalLM": TEXT_GENERATION,
    "LMHeadModel": TEXT_GENERATION,
}
# Encoders whose ``…Model`` gives features; those with "bert" in their name are not listed.
_ENCODERS = frozenset(
    {
        "albert", "beit", "camembert", "canine", "convnext", "convnextv2", "data2vec-text",
        "data2vec-vision", "deberta", "deberta-v2", "deit", "dinov2", "dinov2_with_registers",
        "dinov3_vit", "electra", "ernie", "esm", "focalnet", "gte", "hiera", "ijepa", "longformer",
        "luke", "mobilevit", "mobilevitv2", "mpnet", "mra", "nystromformer", "poolformer", "pvt",
        "pvt_v2", "rembert", "resnet", "roformer", "segformer", "siglip_vision_model", "swin",
        "swinv2", "vit", "vit_mae", "vit_msn", "yolos",
    }
)  # fmt: skip
# Modules that only a classifier has -> the task that they tell, where they tell one.
_HEADS: tuple[tuple[str, str | None], ...] = (
    (r"pre_classifier", "text-classification"),
    (r"classifier\.(dense|out_proj)", "text-classification"),
    (r"classification_head", "text-classification"),
    (r"classifier|score", None),
)
_QUESTIONS = re.compile(r"(^|\.)qa_outputs(\.|$)")


def chosen_task(
    base: Base,
    adapters: Sequence[Adapter],
    asked: str | None,
    mode: Mode,
    say: Notice | None = None,
) -> Task:
    """The task of a bundle.

    Args:
        base: the base model.
        adapters: its adapters.
        asked: the task that the user named; ``None``: what follows from adapters and base.
        mode: of the bundle.
        say: called with one line where an adapter's ``task_type`` is not followed.

    Raises:
        AdapterError: the adapters are for different tasks, or the base lacks a task head and an
            adapter does not bring one.
        UnsupportedAdapterError: an adapter is for a task that is not supported.
        BaseModelError: the task is unknown, or neither adapters nor base tell it.
        UnsupportedModelError: the base is for a task that is not supported.
    """
    name = asked or _trained_for(base, adapters, say or (lambda _: None)) or _task_of(base)
    plain = Task(name)
    if plain.generates:
        return plain
    task = with_heads_of(plain, adapters)
    if task.output != "logits":
        return task
    layer, own = _label_layer(base, adapters, task)
    counts = {adapter.name: adapter.head_labels(layer) for adapter in adapters}
    headless = [name for name, count in counts.items() if count is None]
    if not own and (headless or not counts):
        raise AdapterError(
            f"{base.name_or_path} has no task head, and "
            + (f"adapter {headless[0]} brings none" if headless else "no adapter brings one")
            + (f" ({layer})" if layer else ""),
            "Without its head the outputs would be random: save the adapter with "
            f"modules_to_save=['{layer.partition('.')[0] or 'classifier'}'] (or what the head is "
            "called).",
        )
    brought = [count for count in counts.values() if count is not None]
    if brought and (mode == "merged" or not own):
        task = dataclasses.replace(task, num_labels=brought[0])
    return task


def with_heads_of(task: Task, adapters: Iterable[Adapter]) -> Task:
    """The task, whose head is also what these adapters save whole: the base need not have it."""
    saved = [x for adapter in adapters for x in adapter.config.get("modules_to_save") or ()]
    return dataclasses.replace(task, heads=tuple(dict.fromkeys((*task.heads, *saved))))


def _label_layer(base: Base, adapters: Sequence[Adapter], task: Task) -> tuple[str, bool]:
    """Module path of the layer that makes the labels, and whether the base has it.

    The model tells it. Where PyTorch is not installed, or nothing can be built, it is taken for the
    matrix with the fewest rows of the adapters' heads.
    """
    try:
        built = built_layers(base, task)
    except (MissingDependencyError, BaseModelError):  # said again when the base is captured
        weights = {
            path.removesuffix(".weight"): len(value)
            for adapter in adapters
            for path, value in adapter.saved.items()
            if task.in_head(path) and value.ndim == 2 and path.endswith(".weight")
        }
        layer = min(weights, key=weights.__getitem__, default="")
        return layer, any(map(task.in_head, base.keys()))
    shape = base.shape(f"{built.head}.weight") if built.head else None
    return built.head, shape is not None and shape[0] == built.modules[built.head].out_features


def _trained_for(base: Base, adapters: Sequence[Adapter], say: Notice) -> str | None:
    """The task that the adapters were trained for; ``None`` where none of them says."""
    tasks = {adapter.name: _adapters_task(base, adapter, say) for adapter in adapters}
    found = sorted({task for task in tasks.values() if task is not None})
    if len(found) > 1:
        raise AdapterError(
            f"the adapters are for different tasks: {', '.join(found)}",
            "Export them in bundles of their own, or say which with --task.",
        )
    return found[0] if found else None


def _adapters_task(base: Base, adapter: Adapter, say: Notice) -> str | None:
    """The task of an adapter's ``task_type``, or else of the head that it brings."""
    kind = adapter.config.get("task_type")
    encoder_decoder = bool(base.config.get("is_encoder_decoder"))
    if kind == "SEQ_2_SEQ_LM" or (kind == "CAUSAL_LM" and encoder_decoder):
        if encoder_decoder:
            task = _seq2seq_task(base)
            if kind == "CAUSAL_LM":
                say(f"{adapter.name}: its task_type is {kind}, the base's task is {task}")
            return task
        task = _task_of(base)
        say(
            f"{adapter.name}: its task_type is {kind}, and {base.name_or_path} is no "
            f"encoder-decoder: exported for {task}"
        )
        return task
    if kind in _TASK_OF_TYPE:
        return _TASK_OF_TYPE[kind]
    if kind:
        raise UnsupportedAdapterError(
            f"adapter {adapter.name} is refused: its task_type is {kind!r}, and that is no task of "
            "this release",
            f"Say what it is to do with --task, one of {_all_tasks()}, if it does one of them.",
        )
    return _brought_task(base, adapter)


def _brought_task(base: Base, adapter: Adapter) -> str | None:
    """The task of the head that an adapter brings though its ``task_type`` is unset."""
    owners = sorted({path.rpartition(".")[0] for path in adapter.saved})
    questions = [path for path in owners if _QUESTIONS.search(path)]
    if questions:
        raise UnsupportedAdapterError(
            f"adapter {adapter.name} is refused: it brings {questions[0]}, a head for question "
            "answering, which is no task of this release",
            f"Tasks are {_all_tasks()}.",
        )
    known = _task_of_class(base)
    if known is not None and not Task(known).generates:
        return None  # the base's own class tells
    heads = [(p, task) for pattern, task in _HEADS for p in owners if _is_below(p, pattern)]
    if not heads:
        return None
    layer, task = heads[0]
    if _sees(base):
        return "image-classification"
    if task is None:
        raise AdapterError(
            f"adapter {adapter.name} brings a task head, {layer}, its task_type is unset, and "
            f"{base.name_or_path} ({_class(base) or base.model_type}) does not tell what it is for",
            "Say it with --task: text-classification or token-classification.",
        )
    return task


def _is_below(path: str, pattern: str) -> bool:
    return re.search(rf"(^|\.)({pattern})(\.|$)", path) is not None


def _task_of(base: Base) -> str:
    """The task of the base's own class.

    Raises:
        UnsupportedModelError: its class is for a task that is not supported.
        BaseModelError: it does not tell a task.
    """
    own = _class(base)
    task = _task_of_class(base)
    if task is not None:
        return task
    if base.config.get("is_encoder_decoder"):
        return _seq2seq_task(base)
    if (base.directory / "modules.json").is_file():  # of sentence-transformers
        return "feature-extraction"
    if any(base.config.get(field) for field in ("vision_config", "audio_config")):
        return TEXT_GENERATION  # of its text part
    if own.endswith("Model") and _encodes(base):
        return "feature-extraction"
    if not own and not _encodes(base):
        return TEXT_GENERATION
    if own.endswith("Model") or not own:
        raise BaseModelError(
            f"no task follows from {base.name_or_path}: its class is "
            f"{own or 'not named in config.json'}, and no adapter's task_type says one",
            f"Say it with --task: {_all_tasks()}.",
        )
    raise UnsupportedModelError(
        f"{base.model_type} models of the class {own} are refused: {_spelled(own)} is no task of "
        "this release, and no adapter's task_type says another",
        f"If the adapter is for another task, say it with --task: {_all_tasks()}.",
    )


def _task_of_class(base: Base) -> str | None:
    own = _class(base)
    return next((task for x, task in _TASK_OF_ARCHITECTURE.items() if own.endswith(x)), None)


def _class(base: Base) -> str:
    """The class of transformers that the checkpoint was saved from; empty where it is not said."""
    names = base.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _spelled(name: str) -> str:
    """``BertForQuestionAnswering`` -> ``question answering``."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", name.partition("For")[2] or name)
    return " ".join(word if word.isupper() else word.lower() for word in words)


def _encodes(base: Base) -> bool:
    known = "bert" in base.model_type or base.model_type in _ENCODERS
    return known and not base.config.get("is_decoder")


def _sees(base: Base) -> bool:
    """Whether a base takes images alone."""
    config = base.config
    return "vocab_size" not in config and any(x in config for x in ("image_size", "num_channels"))


def _all_tasks() -> str:
    return ", ".join(TASKS)


def _seq2seq_task(base: Base) -> str:
    """The task of an encoder-decoder: of speech where its inputs have mels."""
    speech = "num_mel_bins" in base.config or "input_feat_per_channel" in base.config
    return SPEECH if speech else TEXT2TEXT
