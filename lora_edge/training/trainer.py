"""Data and a base model -> a PEFT directory: the whole of ``lora-edge train``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_edge.base import Base, resolve_base
from lora_edge.bundle import staging
from lora_edge.errors import BaseModelError, MissingDependencyError
from lora_edge.quiet import quiet
from lora_edge.tasks import Task
from lora_edge.training.data import (
    DataFile,
    Tokenized,
    TokenizedExample,
    classify,
    read_data,
    tokenize,
)
from lora_edge.training.settings import ALL_LINEAR, Settings

if TYPE_CHECKING:
    from lora_edge.training.loop import Outcome, Progress

RECORD_NAME = "training.json"
RECORD_VERSION = 1
CONFIG_NAME = "adapter_config.json"

_DEFAULT_LENGTH = 1024
_LIBRARIES = ("lora-edge", "torch", "transformers", "peft", "accelerate")


def train(
    base: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: str | Sequence[str] | None = None,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dropout: float = 0.0,
    epochs: float = 3.0,
    lr: float = 2e-4,
    weight_decay: float = 0.0,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Train a LoRA adapter on prompts and completions, or on texts and labels; float32, CPU.

    With prompts, the loss is on the completion and the end token after it. With labels, the adapter
    also carries the classifier's head, and the record names the labels in the head's order. The
    same arguments on the same machine give the same bytes. Written are PEFT's own
    ``adapter_config.json`` and ``adapter_model.safetensors``, and ``training.json``, the record of
    the run.

    Args:
        base: folder or hub id of a causal language model; of any text model, with or without a
            head, for labels.
        data: jsonl file of ``{"prompt": …, "completion": …}`` or of ``{"text": …, "label": …}``.
        output: the adapter's folder; made whole or not at all.
        target_modules: ``None`` for every linear layer but the output head, a list of module names,
            or a regex over whole module paths. Other options: see
            :class:`~lora_edge.training.settings.Settings`.
        force: replace ``output`` if it holds an adapter.
        progress: called about a hundred times during the run.
        notify: called with one-line remarks on the data before the run.

    Returns:
        ``output``.

    Raises:
        DataError: the data cannot be read or used.
        BaseModelError: the base cannot be read or used.
        AdapterError: an option that cannot be meant, or a run that diverged.
        BundleError: ``output`` is in the way.
        MissingDependencyError: ``lora-edge[train]`` is not installed.
    """
    if target_modules is None:
        target_modules = ALL_LINEAR
    settings = Settings(
        rank=rank,
        alpha=alpha,
        target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
        rslora=rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        dropout=dropout,
        epochs=epochs,
        lr=lr,
        weight_decay=weight_decay,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    target = Path(output)
    with staging(target, force=force, marker=CONFIG_NAME) as stage:
        source = read_data(Path(data))
        found = resolve_base(base)
        _run(found, source, settings, stage, progress=progress, notify=notify or (lambda _: None))
    return target


def _run(
    base: Base,
    source: DataFile,
    settings: Settings,
    stage: Path,
    *,
    progress: Callable[[Progress], None] | None,
    notify: Callable[[str], None],
) -> None:
    try:
        import accelerate  # noqa: F401  Trainer imports it late, with a longer message
        from transformers import set_seed

        from lora_edge.training.loop import fit
        from lora_edge.training.model import add_lora, load_model, load_tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"training needs {error.name}", "Install it with: pip install 'lora-edge[train]'."
        ) from error
    with quiet(only=()):
        tokenizer = load_tokenizer(base)
        length = _max_length(base, settings)
        task = Task("text-classification", len(source.labels)) if source.labels else None
        examples: Sequence[Tokenized]
        if task is None:
            examples = tokenize(source.examples, tokenizer, length)
        else:
            length = min(length, tokenizer.model_max_length)
            examples = classify(source.labelled, source.labels, tokenizer, length)
        _check_vocabulary(base, examples)
        _remark(examples, length, notify)
        model = load_model(base, task)
        set_seed(settings.seed)
        wrapped = add_lora(model, settings, base.name_or_path, task)
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = tokenizer.eos_token_id
        if task is not None and model.config.pad_token_id is None:
            model.config.pad_token_id = pad  # by which a decoder finds a row's last token
        outcome = fit(
            wrapped,
            examples,
            settings,
            pad_id=pad,
            types="token_type_ids" in tokenizer.model_input_names,
            progress=progress,
        )
        trainable, _ = wrapped.get_nb_trainable_parameters()
        wrapped.save_pretrained(stage, save_embedding_layers=False)
    (stage / "README.md").unlink(missing_ok=True)  # PEFT's form with nothing filled in
    _settle_order(stage / CONFIG_NAME, settings)
    record = _record(base, source, examples, settings, outcome=outcome, trainable=trainable)
    (stage / RECORD_NAME).write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


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
    highest = max(max(example.input_ids) for example in examples)
    if size is not None and highest >= size:
        raise BaseModelError(
            f"{base.name_or_path}: its tokenizer makes token {highest}, but vocab_size is {size}",
            "The tokenizer belongs to another model, or the embeddings must be resized first.",
        )


def _remark(examples: Sequence[Tokenized], length: int, notify: Callable[[str], None]) -> None:
    lengths = sorted(len(example.input_ids) for example in examples)
    targets = _targets(examples)
    notify(
        f"{len(examples)} examples, {sum(lengths)} tokens, "
        + (f"{targets} of them with loss; " if targets else "one label each; ")
        + f"lengths {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}"
    )
    cut = [example.cut for example in examples if example.cut]
    if cut:
        notify(f"{len(cut)} examples lost their ends to max_length {length} ({sum(cut)} tokens)")


def _targets(examples: Sequence[Tokenized]) -> int:
    """Tokens that carry loss; 0 for a classifier."""
    return sum(example.targets for example in examples if isinstance(example, TokenizedExample))


def _settle_order(config_file: Path, settings: Settings) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # PEFT writes a set in the order of the process's string hashes, which differs from run to run.
    for field in ("target_modules", "modules_to_save"):
        if isinstance(config[field], list):
            config[field] = sorted(config[field])
    # PEFT sorts the patterns' keys, and the first match wins: sorted, they can mean something else.
    for option, given in (
        ("rank_pattern", settings.rank_pattern),
        ("alpha_pattern", settings.alpha_pattern),
    ):
        config[option] = {key: config[option][key] for key in given}
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _record(
    base: Base,
    source: DataFile,
    examples: Sequence[Tokenized],
    settings: Settings,
    *,
    outcome: Outcome,
    trainable: int,
) -> dict[str, Any]:
    labels = {"labels": list(source.labels)} if source.labels else {}
    return {
        "record_version": RECORD_VERSION,
        "base": base.name_or_path,
        "base_fingerprint": base.fingerprint(),
        **labels,
        "data": {
            "file": source.path.name,
            "sha256": source.sha256,
            "examples": len(examples),
            "tokens": sum(len(example.input_ids) for example in examples),
            "target_tokens": _targets(examples),
            "examples_cut": sum(example.cut > 0 for example in examples),
        },
        "settings": settings.to_json(),
        "result": {
            "steps": outcome.steps,
            "final_loss": outcome.final_loss,
            "trainable_parameters": trainable,
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            # Run from a checkout that is not installed.
            from lora_edge import __version__

            found[library] = __version__
    return found
