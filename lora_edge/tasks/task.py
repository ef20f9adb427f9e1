"""Tasks: which class of model, and which of its weights an adapter brings.

Knows names and shapes; knows nothing of PyTorch, graphs or runtimes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import BaseModelError

Output = Literal["logits", "last_hidden_state"]
Driver = Literal["decoder", "encoder", "encoder-decoder"]
"""What runs a model: token by token with a cache, at once, or an encoder before a decoder."""

TEXT_GENERATION = "text-generation"
EMBEDDING = "feature-extraction"
TEXT2TEXT, SPEECH = "text2text-generation", "automatic-speech-recognition"


class Unread(NamedTuple):
    """Modules of a model that a task does not read.

    Attributes:
        modules: what their paths match.
        reason: why it does not, for people.
    """

    modules: re.Pattern[str]
    reason: str


_POOLER = Unread(re.compile(r"^pooler\."), "last_hidden_state does not pass through the pooler")
_OTHER_SENSES = Unread(
    re.compile(
        r"(^|\.)(visual|vision_tower|vision_model|vision_backbone|multi_modal_projector|connector|"
        r"audio_tower|embed_vision|embed_audio|image_newline|vision_embed_tokens)(\.|$)"
    ),
    "text alone does not pass through them",
)


class Facts(NamedTuple):
    """What is known of a task.

    Attributes:
        loader: the class of transformers that loads its model.
        driver: what runs it.
        peft_type: PEFT's name of it, with which PEFT saves the head that it trains; empty: none.
        takes: what a person gives it: ``prompt``, ``text``, or the name of the model's input.
        verb: the Runner's method that a person calls.
        by_token: the model has an output for each token of its input.
        metrics: what an adapter's quality is measured by, the usual one first.
        unread: modules that an adapter may change and the task does not read.
    """

    loader: str
    driver: Driver
    peft_type: str
    takes: str
    verb: Literal["generate", "classify", "embed"]
    by_token: bool = False
    metrics: tuple[str, ...] = ()
    unread: tuple[Unread, ...] = ()


TASKS: Mapping[str, Facts] = {
    TEXT_GENERATION: Facts(
        "AutoModelForCausalLM",
        "decoder",
        "CAUSAL_LM",
        "prompt",
        "generate",
        metrics=("exact_match", "perplexity"),
        unread=(_OTHER_SENSES,),
    ),
    "text-classification": Facts(
        "AutoModelForSequenceClassification",
        "encoder",
        "SEQ_CLS",
        "text",
        "classify",
        metrics=("accuracy",),
    ),
    "token-classification": Facts(
        "AutoModelForTokenClassification", "encoder", "TOKEN_CLS", "text", "classify", by_token=True
    ),
    EMBEDDING: Facts(
        "AutoModel",
        "encoder",
        "FEATURE_EXTRACTION",
        "text",
        "embed",
        by_token=True,
        unread=(_POOLER,),
    ),
    "image-classification": Facts(
        "AutoModelForImageClassification", "encoder", "", "pixel_values", "classify"
    ),
    TEXT2TEXT: Facts(
        "AutoModelForSeq2SeqLM", "encoder-decoder", "SEQ_2_SEQ_LM", "prompt", "generate"
    ),
    SPEECH: Facts("AutoModelForSpeechSeq2Seq", "encoder-decoder", "", "input_features", "generate"),
}
"""What there is to do."""

HEADS = ("classifier", "score")
"""What PEFT itself adds to ``modules_to_save`` for classification."""

_HEAD_STD = 0.02


@dataclass(frozen=True)
class Task:
    """What a model is to do.

    Attributes:
        name: one of :data:`TASKS`.
        num_labels: size of the head; ``None`` for the checkpoint's own.
        heads: names of the modules that come with an adapter, so that the base need not have
            them; a name stands for every module path that it is a part of.
    """

    name: str = TEXT_GENERATION
    num_labels: int | None = None
    heads: tuple[str, ...] = HEADS

    def __post_init__(self) -> None:
        """Refuse an unknown task.

        Raises:
            BaseModelError: names the tasks that are known.
        """
        if self.name not in TASKS:
            raise BaseModelError(
                f"the task {self.name!r} is unknown", f"Known are: {', '.join(TASKS)}."
            )
        if self.causal:
            object.__setattr__(self, "heads", ())

    @property
    def facts(self) -> Facts:
        """What is known of it."""
        return TASKS[self.name]

    @property
    def loader(self) -> str:
        """The class of transformers that loads the model."""
        return self.facts.loader

    @property
    def driver(self) -> Driver:
        """What runs the model."""
        return self.facts.driver

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its graphs: the one that reads the inputs first."""
        return tuple(self.driver.split("-"))

    @property
    def causal(self) -> bool:
        """Whether the model is a decoder that generates text."""
        return self.driver == "decoder"

    @property
    def generates(self) -> bool:
        """Whether the model makes tokens, one after the other."""
        return "decoder" in self.parts

    @property
    def seq2seq(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return self.driver == "encoder-decoder"

    @property
    def shared(self) -> frozenset[str]:
        """Kinds of layers that both graphs of an encoder-decoder read; of one graph, none."""
        return frozenset({"embedding"}) if self.seq2seq else frozenset()

    @property
    def output(self) -> Output:
        """Name of the model's output."""
        return "last_hidden_state" if self.name == "feature-extraction" else "logits"

    def in_head(self, key: str) -> bool:
        """Whether a parameter belongs to the head."""
        return not set(self.heads).isdisjoint(key.split("."))

    def label_layer(self, model: Any) -> str:
        """Module path of the linear layer that makes the labels; empty where there is none.

        Args:
            model: transformers' model; its weights are not read.
        """
        if self.output != "logits" or self.generates:
            return ""
        count = getattr(model.config, "num_labels", None)
        # A head is declared behind the layers that it reads.
        modules = reversed(list(model.named_modules()))
        return next((p for p, x in modules if getattr(x, "out_features", None) == count), "")

    @property
    def labels(self) -> dict[str, int]:
        """The arguments of ``AutoConfig.from_pretrained`` that size the head."""
        return {} if self.num_labels is None else {"num_labels": self.num_labels}

    def complete(self, model: Any, missing: Sequence[str], *, pooler: bool = False) -> list[str]:
        """Give a model the head that its checkpoint lacks, and drop a pooler that nobody reads.

        Args:
            model: transformers' model, freshly loaded; changed in place.
            missing: parameters that the checkpoint does not have in the model's shape.
            pooler: keep the pooler, which PEFT may load an adapter onto; what the checkpoint lacks
                of it is made up.

        Returns:
            Those of ``missing`` that are not the head's.
        """
        made_up = list(filter(self.in_head, missing))
        last = getattr(model, "pooler", None)
        # One without parameters costs nothing, and its model may not do without it (ResNet).
        if self.name == EMBEDDING and last is not None and any(True for _ in last.parameters()):
            unread = [key for key in missing if key.startswith("pooler.")]
            missing = [key for key in missing if key not in unread]
            if pooler:
                made_up += unread
            else:
                model.pooler = None
        for key in made_up:
            values = model.get_parameter(key).data
            values.copy_(values.new_tensor(fresh_head(key, tuple(values.shape))))
        return [key for key in missing if not self.in_head(key)]


TEXT = Task()
"""Text generation."""


def fresh_head(key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The values of a head's parameter that the base lacks: the same in every process.

    An adapter brings its own; until then, capture and reference must have the same one.
    """
    random = np.random.default_rng(zlib.crc32(key.encode()))
    return (random.standard_normal(shape) * _HEAD_STD).astype(np.float32)
