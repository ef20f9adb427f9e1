"""What a model without a cache gives for texts and images: outputs, labels, embeddings.

Knows a bundle's files and its session; knows nothing of how adapters are bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.sentence import (
    MODULES_FILE,
    SENTENCE_FOLDER,
    SentenceModules,
    load_sentence_modules,
    sentence_files,
)
from lora_edge.errors import BundleError, DataError
from lora_edge.files.json import read_object
from lora_edge.maths.lora import FloatArray
from lora_edge.names import NONE_ADAPTER
from lora_edge.runtime.adapters.binding import Binding, State
from lora_edge.runtime.encoder import Encoder
from lora_edge.runtime.finite import finite
from lora_edge.runtime.text.tokenizer import Encoded, Tokenizer
from lora_edge.tasks.task import Task

if TYPE_CHECKING:
    from lora_edge.runtime.outputs.image import ImageProcessor

TextInput = str | tuple[str, str]
"""A text, or two that belong together."""


class Label(NamedTuple):
    """A label of a task head and its score.

    Attributes:
        label: the label's name, ``LABEL_<index>`` where nobody gave it one.
        score: softmax over the row's labels, float in [0, 1]; the logistic function of each where
            the base's config says ``multi_label_classification``.
    """

    label: str
    score: float


class TokenLabel(NamedTuple):
    """The best label of one token.

    Attributes:
        text: the token's characters in the text.
        start: of the first of them.
        end: behind the last of them.
        label: the label's name.
        score: softmax over the labels.
    """

    text: str
    start: int
    end: int
    label: str
    score: float


class Outputs:
    """Runs an encoder bundle on texts and images.

    Args:
        bundle: the bundle.
        encoder: its session.
        tokenizer: gives the tokenizer of a row's adapters; called when a text comes.
    """

    def __init__(
        self, bundle: Bundle, encoder: Encoder, tokenizer: Callable[[State], Tokenizer]
    ) -> None:
        self._bundle = bundle
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._sentences: dict[str, SentenceModules] = {}

    @cached_property
    def processor(self) -> ImageProcessor:
        """How images are prepared; raises as :class:`ImageProcessor`."""
        from lora_edge.runtime.outputs.image import PROCESSOR_FILE, ImageProcessor

        self._verified((PROCESSOR_FILE,))
        return ImageProcessor.load(self._bundle.directory)

    @cached_property
    def sentence(self) -> SentenceModules:
        """How texts become embeddings; raises as :func:`load_sentence_modules`."""
        return self._load_sentence("")

    def sentence_of(self, state: State) -> SentenceModules:
        """The same of a row's adapters, which may bring modules of their own.

        Raises:
            DataError: the adapters of a blend do not agree.
        """
        manifest = self._bundle.manifest
        names = [name for name, _ in state]
        if manifest.mode == "merged":
            names = list(manifest.adapters)
        found = [self._sentence_of_adapter(name) for name in names] or [self.sentence]
        if any(each != found[0] for each in found):
            raise DataError(
                f"the adapters {', '.join(name for name, _ in state)} make embeddings in unlike "
                "ways and cannot be blended",
                "Use one of them at a time.",
            )
        return found[0]

    def _sentence_of_adapter(self, name: str) -> SentenceModules:
        if name not in self._sentences:
            folder = f"adapters/{name}/{SENTENCE_FOLDER}"
            own = f"{folder}/{MODULES_FILE}" in self._bundle.manifest.files
            self._sentences[name] = self._load_sentence(folder) if own else self.sentence
        return self._sentences[name]

    def _load_sentence(self, folder: str) -> SentenceModules:
        directory = self._bundle.directory / folder
        prefix = f"{folder}/" if folder else ""
        self._verified([prefix + name for name in sentence_files(directory)])
        return load_sentence_modules(directory, self._bundle.directory)

    @cached_property
    def _multi_label(self) -> bool:
        self._verified(("config.json",))
        path = self._bundle.directory / "config.json"
        if not path.is_file():
            return False
        config = read_object(path, BundleError, "Copy the bundle again.", nonfinite=True)
        return bool(config.get("problem_type") == "multi_label_classification")

    def encode(
        self,
        texts: Sequence[TextInput],
        max_length: int | None = None,
        states: Sequence[State] | None = None,
        lower_case: bool = False,
    ) -> list[Encoded]:
        """The tokens of texts, each by its own adapters' tokenizer; ``None``: by the base's.

        Args:
            texts: texts, or tuples of two.
            max_length: cut them to this many tokens, the model's own limit at most.
            lower_case: as :meth:`Tokenizer.encode_input` has it.

        Raises:
            DataError: a text that is none.
        """
        limit = min(x for x in (max_length, self._encoder.part.max_length) if x is not None)
        found = []
        for text, state in zip(texts, states or [()] * len(texts), strict=True):
            pair = text if isinstance(text, tuple) else (text, None)
            if not isinstance(pair[0], str) or not isinstance(pair[1], str | None):
                raise DataError(
                    f"a text is {type(text).__name__}, expected a string, or a tuple of two",
                    "Give texts, or pixel_values for a model of images.",
                )
            tokenizer = self._tokenizer(state)
            found.append(tokenizer.encode_input(*pair, max_length=limit, lower_case=lower_case))
        return found

    def rows(self, rows: Sequence[Sequence[int]], types: Any, binding: Binding) -> list[FloatArray]:
        """The output of each row of token ids, without what stands at padded places.

        Returns:
            Per row ``[labels]``, ``[len, labels]`` or ``[len, hidden]``.
        """
        found = self._encoder.run(self._encoder.feeds(rows, types), binding)
        return self._trimmed(found, binding, [len(row) for row in rows])

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        width: int,
        types: ArrayLike | None,
        binding: Binding,
    ) -> FloatArray:
        """The output of rows of token ids, in the layout that they came in.

        Args:
            rows: token ids, without padding.
            starts: the column in which each row begins.
            width: number of columns.
            types: ``[batch, width]`` token types; None is all zeros.
            binding: the adapters of the rows.

        Returns:
            ``[batch, labels]``, ``[batch, width, labels]`` or ``[batch, width, hidden] float32``;
            zeros at padded places and behind a row's own labels.
        """
        given = None
        if types is not None:
            given = [
                np.asarray(row)[start : start + len(ids)].tolist()
                for row, start, ids in zip(np.asarray(types), starts, rows, strict=True)
            ]
        found = self.rows(rows, given, binding)
        size = max(row.shape[-1] for row in found)
        out = np.zeros((len(rows), *([width] if found[0].ndim == 2 else []), size), np.float32)
        for index, values in enumerate(found):
            if values.ndim == 1:
                out[index, : len(values)] = values
            else:
                part = slice(starts[index], starts[index] + len(values))
                out[index, part, : values.shape[-1]] = values
        return out

    def pixels(self, pixels: NDArray[np.float32], binding: Binding) -> list[FloatArray]:
        """As :meth:`rows`, of ``[batch, *part.sample] float32``."""
        found = self._encoder.run({"pixel_values": pixels}, binding)
        return self._trimmed(found, binding, None)

    def classify(
        self, inputs: Sequence[Any], binding: Binding, names: Sequence[State]
    ) -> list[list[Label]] | list[list[TokenLabel]]:
        """Labels of texts or images, or of the tokens of texts, as the task has it."""
        if self._encoder.part.sample:
            return self.classify_images(inputs, binding, names)
        by_token = Task(self._bundle.manifest.task).facts.by_token
        return (self.label_tokens if by_token else self.classify_texts)(inputs, binding, names)

    def classify_texts(
        self, texts: Sequence[TextInput], binding: Binding, names: Sequence[State]
    ) -> list[list[Label]]:
        """Labels of each text, best first."""
        coded = self.encode(texts, states=names)
        rows = self.rows([x.ids for x in coded], [x.type_ids for x in coded], binding)
        return self._labels(rows, names)

    def classify_images(
        self, images: Sequence[Any], binding: Binding, names: Sequence[State]
    ) -> list[list[Label]]:
        """Labels of each image, best first."""
        return self._labels(self.pixels(self.processor(images), binding), names)

    def label_tokens(
        self, texts: Sequence[str], binding: Binding, names: Sequence[State]
    ) -> list[list[TokenLabel]]:
        """The best label of each token of each text, special tokens left out."""
        coded = self.encode(texts, states=names)
        rows = self.rows([x.ids for x in coded], [x.type_ids for x in coded], binding)
        found = []
        for text, one, logits, state in zip(texts, coded, map(finite, rows), names, strict=True):
            labels = self._names(state, logits.shape[-1])
            scores = _softmax(logits)
            found.append(
                [
                    TokenLabel(text[a:b], a, b, labels[int(row.argmax())], float(row.max()))
                    for (a, b), row in zip(one.offsets, scores, strict=True)
                    if b > a
                ]
            )
        return found

    def embed(
        self,
        texts: Sequence[TextInput],
        binding: Binding,
        states: Sequence[State],
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> FloatArray:
        """``[batch, hidden] float32``, pooled as the files of the model, or of each adapter, say.

        Args:
            texts: texts, or tuples of two.
            binding: the adapters of the rows.
            states: the same by name.
            prompt: what is put in front of each text; ``None``: the prompt of ``prompt_name``.
            prompt_name: ``None``: the files' default.

        Raises:
            OptionError: there is no such prompt.
            DataError: rows of adapters whose embeddings are of unlike sizes.
        """
        sentences = [self.sentence_of(state) for state in states]
        leads = [x.prompt(prompt_name) if prompt is None else prompt for x in sentences]
        led = [_led(lead, text) for lead, text in zip(leads, texts, strict=True)]
        coded = [
            self.encode([text], sentence.max_length, [state], sentence.lower_case)[0]
            for text, sentence, state in zip(led, sentences, states, strict=True)
        ]
        rows = [x.ids for x in coded]
        feeds = self._encoder.feeds(rows, [x.type_ids for x in coded])
        hidden = self._encoder.run(feeds, binding)
        found = []
        for index, (sentence, lead, state) in enumerate(zip(sentences, leads, states, strict=True)):
            own = slice(index, index + 1)
            length = self._prompt_length(sentence, lead, state)
            found.append(sentence.pooling(hidden[own], feeds["attention_mask"][own], length)[0])
        sizes = sorted({len(vector) for vector in found})
        if len(sizes) > 1:
            raise DataError(
                f"the adapters of the rows give embeddings of {sizes} numbers",
                "Embed the texts of each adapter in a call of their own.",
            )
        return finite(np.stack(found))

    def _prompt_length(self, sentence: SentenceModules, prompt: str, state: State) -> int:
        """Tokens of a prompt alone, without the special one that ends it."""
        if not prompt or sentence.pooling.include_prompt:
            return 0
        (coded,) = self.encode([prompt], sentence.max_length, [state], sentence.lower_case)
        special = coded.ids[-1:] and coded.ids[-1] in self._tokenizer(state).special_ids
        return len(coded.ids) - bool(special)

    def _labels(self, rows: Sequence[FloatArray], states: Sequence[State]) -> list[list[Label]]:
        found = []
        for logits, state in zip(map(finite, rows), states, strict=True):
            scores = _logistic(logits) if self._multi_label else _softmax(logits)
            labels = self._names(state, len(logits))
            order = np.argsort(-scores, kind="stable")
            found.append([Label(labels[int(i)], float(scores[i])) for i in order])
        return found

    def _names(self, state: State, count: int) -> Sequence[str]:
        """The labels of a row's head: its adapter's, or the base's."""
        adapters: Mapping[str, Any] = self._bundle.manifest.adapters
        own = [adapters[name].labels for name, _ in state]
        if self._bundle.manifest.mode == "merged":
            own = [entry.labels for entry in adapters.values()]
        base = adapters[NONE_ADAPTER].labels if NONE_ADAPTER in adapters else ()
        for labels in (*own, base):
            if len(labels) == count:
                return tuple(labels)
        return [f"LABEL_{index}" for index in range(count)]

    def _trimmed(
        self, found: FloatArray, binding: Binding, lengths: Sequence[int] | None
    ) -> list[FloatArray]:
        """Each row without padded positions, and without labels that only other rows have."""
        rows = [row if lengths is None else row[: lengths[i]] for i, row in enumerate(found)]
        if found.ndim == 2:  # one output for the whole row
            rows = list(found)
        if binding.labels:
            counts = binding.labels * (1 if len(binding.labels) > 1 else len(rows))
            rows = [row[..., :count] for row, count in zip(rows, counts, strict=True)]
        return rows

    def _verified(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._bundle.manifest.files:
                self._bundle.verify(name)


def _led(prompt: str, text: TextInput) -> TextInput:
    """A text with a prompt in front of it; what is no text is refused where it is tokenized."""
    if not prompt or not isinstance(text, str | tuple):
        return text
    return prompt + text if isinstance(text, str) else (prompt + text[0], *text[1:])


def _logistic(logits: FloatArray) -> FloatArray:
    scores: FloatArray = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return scores


def _softmax(logits: FloatArray) -> FloatArray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    scores: FloatArray = shifted / shifted.sum(-1, keepdims=True)
    return scores
