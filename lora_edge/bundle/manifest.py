"""``lora_edge.json``: what a runtime or a person needs to know about a bundle, and its JSON.

Knows JSON; knows nothing of the files that it tells of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from lora_edge.base.layer import Layer
from lora_edge.errors import BundleError
from lora_edge.files.json import parse_object
from lora_edge.files.schema import RelativePath, Rule, Sha256, between, decode, sized
from lora_edge.maths.quantization import Precision, Quantization
from lora_edge.names import FACTOR_PARTS, Part, TextAspect
from lora_edge.tasks.task import SEQ2SEQ, TASKS, TEXT_GENERATION, Output

MANIFEST_NAME = "lora_edge.json"
FORMAT_VERSION = 1

Mode = Literal["switchable", "merged"]
Form = Literal["fused", "portable", "foreign"]
Padding = Literal["right", "left", "either"]

_TASKS = (TEXT_GENERATION, *TASKS, *SEQ2SEQ)
TaskName = Annotated[str, Rule(f"one of {', '.join(_TASKS)}", _TASKS.__contains__)]

# Far above any model's, and low enough that nothing that is made from them fills the memory.
_Layers = Annotated[int, between(1, 4096)]
_Heads = Annotated[int, between(1, 1 << 16)]
_Vocabulary = Annotated[int, between(0, 1 << 24)]
_Positions = Annotated[int, between(0, 1 << 31)]
_Size = Annotated[int, between(0, 1 << 31)]
_Token = Annotated[int, between(-1, 1 << 31)]
_Shape = Annotated[tuple[Annotated[int, between(0, 1 << 31)], ...], sized(0, 8)]
_Image = Annotated[tuple[Annotated[int, between(1, 1 << 14)], ...], sized(0, 3)]
_Names = tuple[str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """What a runtime must know of a decoder graph, whoever made it.

    Attributes:
        form: ``fused`` (GroupQueryAttention, cache inside the operator), ``portable`` (standard
            operators) or ``foreign`` (someone else's graph).
        backend: what made the base graph: ``trace`` or ``optimum``.
        padding: the side(s) on which a batch of unequal rows may be padded.
        shared_cache: past and present may be one buffer of ``max_length`` positions.
        layers: number of layers with a KV cache.
        kv_heads: number of key/value heads.
        head_dim: size of each key/value head.
        vocab_size: size of the logits' last dimension.
        max_length: longest sequence the model's positions allow.
        head: module path of the layer that makes the logits.
    """

    form: Form
    backend: str
    padding: Padding
    shared_cache: bool
    layers: _Layers
    kv_heads: _Heads
    head_dim: _Heads
    vocab_size: _Vocabulary
    max_length: _Positions
    head: str = ""


@dataclass(frozen=True)
class EncoderSpec:
    """What a runtime must know of a graph without a cache: an encoder, or a model with a head.

    Rows of unequal lengths are padded on the right.

    Attributes:
        form: ``portable``: standard operators.
        backend: what made the base graph: ``trace``.
        inputs: the graph's inputs beside the adapters': ``input_ids``, ``attention_mask`` and,
            where the model takes them, ``token_type_ids``; or ``pixel_values``.
        output: ``logits`` or ``last_hidden_state``.
        vocab_size: token ids are below it; 0 for images.
        max_length: longest sequence that the model's positions allow; 0 for images.
        pad_token_id: fills up short rows; a model may tell its last token by it.
        image: ``(channels, height, width)`` of ``pixel_values``; empty for text.
    """

    form: Form
    backend: str
    inputs: tuple[str, ...]
    output: Output
    vocab_size: _Vocabulary
    max_length: _Positions
    pad_token_id: _Token
    image: _Image = ()


@dataclass(frozen=True)
class Seq2SeqSpec:
    """What a runtime must know of an encoder and a decoder in two graphs, without a cache.

    Attributes:
        form: ``foreign``.
        backend: what made the graphs: ``optimum``.
        encoder: module path of the encoder; the layers below it are in the encoder's graph.
        inputs: the encoder graph's inputs beside the adapters': ``input_ids`` and
            ``attention_mask``, or ``input_features``.
        vocab_size: size of the logits' last dimension.
        max_source: longest input that the encoder's positions allow; 0: any.
        max_target: the same of the decoder.
        pad_token_id: fills up short inputs.
        start: what the decoder begins with: its start token, and what the checkpoint forces
            behind it.
        open_language: the checkpoint leaves the language of the speech open, so that ``start``
            alone does not begin a transcript.
        suppress: tokens that are never generated.
        begin_suppress: tokens that are not generated first.
        features: ``(mels, frames)`` of ``input_features``; empty for text.
    """

    form: Form
    backend: str
    encoder: str
    inputs: tuple[str, ...]
    vocab_size: _Vocabulary
    max_source: _Positions
    max_target: _Positions
    pad_token_id: _Token
    start: tuple[_Token, ...]
    open_language: bool = False
    suppress: tuple[_Token, ...] = ()
    begin_suppress: tuple[_Token, ...] = ()
    features: _Image = ()


Spec = TypeVar("Spec", GraphSpec, EncoderSpec, Seq2SeqSpec)


@dataclass(frozen=True)
class WeightEntry:
    """Where ``onnx/base.onnx`` has a site's weight: in ``onnx/model.onnx_data``, row by row.

    Attributes:
        name: the initializer's name.
        dtype: ``float32`` or ``float16``.
        shape: of the whole initializer, which packed projections share.
        offset: byte of the data file at which it begins.
        transposed: it is ``[out, in]``, not ``[in, out]``.
        start: the site's first output in it; 0 unless projections are packed.
        readers: number of nodes that read it; above 1 where layers share it.
    """

    name: str
    dtype: Literal["float32", "float16"]
    shape: _Shape
    offset: Annotated[int, between(0, 1 << 50)]
    transposed: bool = False
    start: _Positions = 0
    readers: _Size = 1


@dataclass(frozen=True)
class SiteEntry(Layer):
    """A layer of the model, with the inputs that an adapter has there in the graph.

    Attributes:
        parts: the graph inputs ``lora.<path>.<part>`` that the site has.
        weight: where a decoder without branches has its weight; None where it has none, or the
            weight is kept in another way.
    """

    parts: tuple[Part, ...] = FACTOR_PARTS
    weight: WeightEntry | None = None

    @classmethod
    def of(cls, layer: Layer, parts: tuple[Part, ...] = FACTOR_PARTS) -> SiteEntry:
        """A layer of the base with these inputs."""
        own = {field.name: getattr(layer, field.name) for field in dataclasses.fields(Layer)}
        return cls(**own, parts=parts)


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter of the bundle.

    Attributes:
        name: how the runtime refers to it.
        file: path of the ``.onnx_adapter`` relative to the bundle; empty when merged.
        kind: human-readable kind, e.g. ``LoRA``, ``rsLoRA``, ``none``.
        ranks: rank per site that the adapter changes (others have rank 0 or zeros).
        digest: sha256 of the PEFT files it came from.
        base_fingerprint: fingerprint of the base model that it was exported for.
        proved: parity with PyTorch was checked, and passed when it last was.
        alone: why it is neither blended nor weighted, e.g. ``DoRA``; empty where it may be.
        invocation: token ids that activate an aLoRA; empty for any other adapter.
        labels: names of the outputs of its task head.
        text: what it brings of its own, because it differs from the base's: ``tokenizer`` (ids,
            special tokens), ``chat_template``. The files are in ``adapters/NAME/text/``; of a
            merged bundle they are the bundle's own.
        conversion: for a LoRA that approximates an adapter of another type: ``peft_type``, the
            ``rank`` asked for, ``worst_error`` and ``mean_error`` of ΔW over its layers.
    """

    name: str
    file: RelativePath | Literal[""]
    kind: str
    ranks: Mapping[str, _Positions]
    digest: str
    base_fingerprint: str
    proved: bool
    alone: str = ""
    invocation: tuple[_Token, ...] = ()
    labels: tuple[str, ...] = ()
    text: tuple[TextAspect, ...] = ()
    conversion: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class FileEntry:
    """Content hash and size of a file of the bundle.

    Attributes:
        sha256: of the content.
        bytes: its size.
        sample: :func:`lora_edge.files.sample.sample_file` of a large file; None in bundles from
            before it was recorded.
    """

    sha256: Sha256
    bytes: Annotated[int, between(0, 1 << 50)]
    sample: Sha256 | None = None


@dataclass(frozen=True)
class Manifest:
    """``lora_edge.json``: everything a runtime or a person needs to know about a bundle.

    Attributes:
        mode: ``switchable`` (adapters are inputs) or ``merged`` (one adapter is in the weights).
        task: ``text-generation``, or one of :data:`lora_edge.tasks.task.TASKS`.
        precision: precision of the graph's linear layers: ``fp32``, ``int8`` or ``int4``.
        graph: the graph's facts: a GraphSpec for ``text-generation``, a Seq2SeqSpec for
            ``text2text-generation`` and ``automatic-speech-recognition``, else an EncoderSpec.
        base: ``name_or_path``, ``model_type``, ``fingerprint`` of the base model.
        kinds: which kinds of adapter the graph has inputs for, e.g. ``lora``, ``dora``.
        sites: module path -> site; empty when merged.
        uncovered: module path -> layer that an adapter could change and that has no inputs.
        tied: module paths of the embedding and of the output layer that shares its weight; empty
            where none does.
        adapters: name -> adapter.
        base_check: figures of the base graph's check against eager PyTorch.
        versions: versions of the packages that made the bundle.
        files: relative path -> hash and size, of every other file of the bundle.
        quantization: how the base's weights were rounded; ``None`` where they were not.
    """

    mode: Mode
    task: TaskName
    precision: Precision
    graph: GraphSpec | EncoderSpec | Seq2SeqSpec
    base: Mapping[str, str]
    kinds: tuple[str, ...]
    sites: Mapping[str, SiteEntry]
    adapters: Mapping[str, AdapterEntry]
    base_check: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[RelativePath, FileEntry] = field(default_factory=dict)
    uncovered: Mapping[str, SiteEntry] = field(default_factory=dict)
    tied: tuple[str, ...] = ()
    quantization: Quantization | None = None
    format_version: int = FORMAT_VERSION

    @property
    def decoder(self) -> GraphSpec:
        """The graph's facts, when it is a decoder with a cache.

        Raises:
            BundleError: it is not.
        """
        if isinstance(self.graph, GraphSpec):
            return self.graph
        raise BundleError(
            f"the bundle's task is {self.task}; it generates no text",
            "Ask it for its outputs instead, or export the base for text-generation.",
        )

    @property
    def encoder(self) -> EncoderSpec:
        """The graph's facts, when it has no cache.

        Raises:
            BundleError: it has one.
        """
        if isinstance(self.graph, EncoderSpec):
            return self.graph
        raise BundleError(
            f"the bundle's task is {self.task}; it has no labels or embeddings",
            "Export the base for the adapter's own task.",
        )

    @property
    def seq2seq(self) -> Seq2SeqSpec:
        """The graphs' facts, when they are an encoder and a decoder.

        Raises:
            BundleError: it is one graph.
        """
        if isinstance(self.graph, Seq2SeqSpec):
            return self.graph
        raise BundleError(
            f"the bundle's task is {self.task}; it has no encoder and decoder",
            "Export an encoder-decoder such as T5 or Whisper.",
        )

    def to_json(self) -> str:
        """The manifest as indented JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str | bytes, what: str = MANIFEST_NAME) -> Manifest:
        """Parse a manifest; ``what`` names it in an error.

        Raises:
            BundleError: not a manifest, or one of a format version that this release cannot read.
        """
        data = parse_object(text, what, BundleError, _HINT)
        version = data.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise BundleError(
                f"{what} has format_version {version!r}, expected {FORMAT_VERSION}",
                "Use the lora-edge release that wrote the bundle, or export it again.",
            )
        task = data.get("task")
        spec = _SPECS.get(task, EncoderSpec) if isinstance(task, str) else EncoderSpec
        manifest = decode(Manifest, data, what, BundleError, _HINT, graph=spec)
        manifest._check(what)
        return manifest

    def _check(self, what: str) -> None:
        """Check what one field says of another."""
        for name in ("fingerprint", "model_type", "name_or_path"):
            if name not in self.base:
                raise BundleError(f"{what}: base.{name} is missing", _HINT)
        for key, entry in self.adapters.items():
            if entry.name != key:
                raise BundleError(
                    f"{what}: the adapter {key!r} is called {entry.name!r} inside", _HINT
                )
            if self.mode == "switchable" and entry.file not in self.files:
                raise BundleError(
                    f"{what}: adapter {key!r} has the file {entry.file!r}, which is none "
                    "of the bundle's",
                    _HINT,
                )


_HINT = "Copy the bundle again, or export it again."
_SPECS: Mapping[str, type[GraphSpec | Seq2SeqSpec]] = {
    "text-generation": GraphSpec,
    "text2text-generation": Seq2SeqSpec,
    "automatic-speech-recognition": Seq2SeqSpec,
}


def aspect_names(aspects: Sequence[TextAspect]) -> str:
    """What an adapter brings, in words, e.g. ``tokenizer and chat template``."""
    return " and ".join(aspect.replace("_", " ") for aspect in aspects)
