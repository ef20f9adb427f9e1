"""PyTorch's answers to what a bundle is asked around its graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import Base
from lora_edge.base.quiet import quiet
from lora_edge.bundle.sentence import MODULES_FILE, SENTENCE_FOLDER
from lora_edge.errors import BaseModelError, LoraEdgeError
from lora_edge.files.tokenizer import read_templates
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.around import asked
from lora_edge.parity.around.reference import (
    Parameters,
    lowered,
    pooled,
    reference_generation,
    reference_labels,
    reference_pixels,
    reference_tokenizer,
    rendered,
)
from lora_edge.parity.plan.states import state_of
from lora_edge.parity.reference import Reference
from lora_edge.parity.subjects import subject_of
from lora_edge.parity.subjects.encoder import EncoderSubject
from lora_edge.runtime import ImageProcessor, Runner, load_sentence_modules
from lora_edge.runtime.text.corpus import CONVERSATIONS
from lora_edge.runtime.text.texts import text_folder
from lora_edge.tasks.task import Task

DATED = "strftime_now"
"""What a chat template calls whose text is another one tomorrow."""


def expected_answers(
    runner: Runner, reference: Reference, sources: Mapping[str, Path], parameters: Parameters
) -> asked.Answers:
    """What transformers and PyTorch answer, of everything that the bundle can be asked.

    Args:
        runner: of the bundle.
        reference: its model in PyTorch, with the adapters.
        sources: adapter -> PEFT directory.
        parameters: the base's model.

    Raises:
        BaseModelError: transformers cannot read the base's files, and the bundle can.
    """
    base = reference.base
    found: asked.Answers = {asked.LENGTHS: _lengths(runner, base, parameters)}
    task = Task(runner.bundle.manifest.task)
    if task.generates:
        found[asked.ENDS], found[asked.DEFAULTS] = reference_generation(base.directory)
    elif task.output == "logits":
        found[asked.LABELS] = _labels(runner, base, sources, parameters)
    if asked.has_tokenizer(runner):
        tokenizers = dict(_tokenizers(runner, base, sources))
        for name, tokenizer in tokenizers.items():
            suffix = f"{asked.OF}{name}" if name else ""
            found[asked.TOKENIZER + suffix] = _tokens(tokenizer, generates=task.generates)
            if getattr(tokenizer, "chat_template", None):
                found[asked.CHAT + suffix] = [
                    {"messages": list(chat), "text": rendered(tokenizer, chat)}
                    for chat in CONVERSATIONS
                ]
        if asked.embeds(runner) and tokenizers:
            found[asked.EMBEDDINGS] = _embeddings(runner, reference, sources, tokenizers)
    if asked.takes_images(runner) and _prepares(base):
        found[asked.IMAGES] = _images(base)
    return found


def _tokenizers(
    runner: Runner, base: Base, sources: Mapping[str, Path]
) -> Iterator[tuple[str, Any]]:
    """transformers' tokenizers: the bundle's own, by the name ``""``, and those of adapters.

    A merged bundle's own is its adapter's, where that brings one. What neither side can read is
    left out.
    """
    manifest = runner.bundle.manifest
    merged = manifest.mode == "merged"
    for name in ("", *sources):
        aspects = manifest.adapters[name].text if name else ()
        if merged and not name:
            aspects = tuple(x for entry in manifest.adapters.values() for x in entry.text)
        if name and (merged or not aspects):
            continue
        own = runner.bundle.directory / ("" if merged else text_folder(name))
        try:
            tokenizer = reference_tokenizer(own if "tokenizer" in aspects else base.directory)
            if "chat_template" in aspects:
                templates = dict(read_templates(own))
                tokenizer.chat_template = templates.get("default", templates)
        except BaseModelError:
            try:
                _ = runner.tokenizer
            except LoraEdgeError:
                continue
            raise
        yield name, tokenizer


def _tokens(tokenizer: Any, *, generates: bool) -> dict[str, Any]:
    texts = asked.questions([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
    rows = []
    for text in texts:
        with quiet():  # of texts that are longer than the model's positions
            ids = tokenizer(text)["input_ids"]
            plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=True)
        row = {"text": text, "ids": list(ids), "plain": list(plain), "back": back}
        if generates:
            stop = asked.stop_of(back)
            row |= {"streamed": back, "stopped": back[: back.index(stop)] if stop else back}
        rows.append(row)
    return {"vocabulary": asked.vocabulary(tokenizer.get_vocab()), "texts": rows}


def _lengths(runner: Runner, base: Base, parameters: Parameters) -> dict[str, int]:
    """Facts of the part that reads, as config.json has them or else the model."""
    text = base.config.get("text_config", base.config)
    told = {"pad_token_id": text.get("pad_token_id")}
    known = subject_of(runner.bundle.manifest).known
    found = {name: told.get(name) or getattr(parameters, name) for name in known}
    return {name: int(value) for name, value in found.items() if value is not None}


def _labels(
    runner: Runner, base: Base, sources: Mapping[str, Path], parameters: Parameters
) -> dict[str, Any]:
    """The names of each adapter's labels; of one that names none, the base's or none."""
    manifest = runner.bundle.manifest
    every = reference_labels(base.directory)
    weight = f"{parameters.label_layer}.weight"
    own = base.parameter(weight) is not None  # else the model's head is made up
    head = parameters.value(weight) if own else None
    unnamed = [] if head is None else [f"LABEL_{index}" for index in range(len(head))]
    named = (every or unnamed) if own else []
    found = {NONE_ADAPTER: named} if NONE_ADAPTER in manifest.adapters else {}
    for name, directory in sources.items():
        adapter = load_adapter(directory, name)
        given = list(manifest.adapters[name].labels)
        if adapter.labels:
            found[name] = list(adapter.labels)
        elif given:
            count = adapter.head_labels(parameters.label_layer)
            found[name] = named if count in (None, len(named)) else []
    in_file = every if "id2label" in base.config else []
    if manifest.mode == "merged":
        in_file = next((names for names in found.values() if names), in_file)
    return {"manifest": found, "config.json": in_file}


def _embeddings(
    runner: Runner,
    reference: Reference,
    sources: Mapping[str, Path],
    tokenizers: Mapping[str, Any],
) -> list[dict[str, Any]]:
    subject = EncoderSubject(runner.bundle.manifest.parts, None)
    found = []
    for name in asked.adapters_asked(runner):
        state = (
            next(iter(sources), None) if name is None else None if name == NONE_ADAPTER else name
        )
        folder = _sentence_folder(runner, reference.base, sources, state)
        sentence = load_sentence_modules(folder, reference.base.directory)
        own = tokenizers.get(state or "", tokenizers[""])
        if sentence.lower_case:
            own = lowered(own)
        limit = min(x for x in (sentence.max_length, subject.reads.max_length) if x is not None)
        prompt = sentence.default_prompt
        skipped = 0
        if prompt and not sentence.pooling.include_prompt:
            ids = own(prompt, truncation=True, max_length=limit)["input_ids"]
            skipped = len(ids) - (ids[-1] in own.all_special_ids)
        for text in asked.EMBEDDED:
            row = own(prompt + text, truncation=True, max_length=limit)
            ids = row["input_ids"]
            inputs = subject.inputs_of(ids, row.get("token_type_ids") or [0] * len(ids))
            (hidden,) = reference.outputs([inputs], [state_of(state)])
            vector = pooled(
                hidden,
                list(sentence.pooling.modes),
                normalize=sentence.pooling.normalize,
                skipped=skipped,
            )
            asking = {"text": text, "adapter": name}
            found.append({**asking, "size": len(vector), "values": asked.kept(vector)})
    return found


def _sentence_folder(
    runner: Runner, base: Base, sources: Mapping[str, Path], name: str | None
) -> Path:
    """Where an adapter's own sentence-transformers files are, or the base's."""
    if name is None:
        return base.directory
    carried = runner.bundle.directory / "adapters" / name / SENTENCE_FOLDER
    own = [folder for folder in (sources[name], carried) if (folder / MODULES_FILE).is_file()]
    return own[0] if own else base.directory


def _prepares(base: Base) -> bool:
    """Whether the runtime prepares images as the base's file says; else it refuses them."""
    try:
        ImageProcessor.load(base.directory)
    except LoraEdgeError:
        return False
    return True


def _images(base: Base) -> list[dict[str, Any]]:
    pixels = reference_pixels(base.directory)
    found = []
    for index in range(len(asked.PICTURES)):
        values = pixels(asked.picture(index))
        found.append({"picture": index, "shape": list(values.shape), "values": asked.kept(values)})
    return found
