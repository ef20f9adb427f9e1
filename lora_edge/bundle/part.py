"""A part of a bundle: one ONNX graph, and what a runtime must know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from lora_edge.base.layer import Layer
from lora_edge.files.schema import RelativePath, between, sized
from lora_edge.names import FACTOR_PARTS, InputPart
from lora_edge.tasks.task import Output

Form = Literal["fused", "portable", "foreign"]
Padding = Literal["right", "left", "either"]

# Far above any model's, and low enough that nothing that is made from them fills the memory.
Layers = Annotated[int, between(1, 4096)]
Heads = Annotated[int, between(1, 1 << 16)]
Vocabulary = Annotated[int, between(0, 1 << 24)]
Positions = Annotated[int, between(0, 1 << 31)]
Size = Annotated[int, between(0, 1 << 31)]
Token = Annotated[int, between(-1, 1 << 31)]
Shape = Annotated[tuple[Annotated[int, between(0, 1 << 31)], ...], sized(0, 8)]
_Sample = Annotated[tuple[Annotated[int, between(1, 1 << 14)], ...], sized(0, 3)]


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
    shape: Shape
    offset: Annotated[int, between(0, 1 << 50)]
    transposed: bool = False
    start: Positions = 0
    readers: Size = 1


@dataclass(frozen=True)
class SiteEntry(Layer):
    """A layer of the model, with the inputs that an adapter has there in the graph.

    Attributes:
        parts: the graph inputs ``lora.<path>.<part>`` that the site has.
        weight: where a decoder without branches has its weight; None where it has none, or the
            weight is kept in another way.
    """

    parts: tuple[InputPart, ...] = FACTOR_PARTS
    weight: WeightEntry | None = None

    @classmethod
    def of(cls, layer: Layer, parts: tuple[InputPart, ...] = FACTOR_PARTS) -> SiteEntry:
        """A layer of the base with these inputs."""
        own = {field.name: getattr(layer, field.name) for field in dataclasses.fields(Layer)}
        return cls(**own, parts=parts)


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far: inputs ``past_key_values.*``, outputs ``present.*``.

    Attributes:
        kind: ``shared``: past and present may be one buffer of ``max_length`` positions;
            ``concatenated``: the present is the past and the new tokens.
        layers: number of layers that have one.
        kv_heads: number of key/value heads.
        head_dim: size of each key/value head.
    """

    kind: Literal["shared", "concatenated"]
    layers: Layers
    kv_heads: Heads
    head_dim: Heads


@dataclass(frozen=True)
class StaticGraph:
    """The same graph with a number for every dimension, on the same data; it runs one row.

    Attributes:
        file: path of the graph, relative to the bundle.
        seq: tokens of one run; fewer are padded on the right.
        past: positions of the cache that it reads; its presents are the new tokens' alone.
        rank: of A and B at every site, lower ones padded with zeros; 0: it has no sites.
    """

    file: RelativePath
    seq: Annotated[int, between(1, 1 << 20)]
    past: Annotated[int, between(1, 1 << 24)]
    rank: Annotated[int, between(0, 1 << 20)]

    @property
    def room(self) -> int:
        """Tokens that a row may have, prompt and continuation."""
        return self.seq + self.past

    def line(self) -> str:
        """What is fixed, in words."""
        rank = f", adapters of rank up to {self.rank}" if self.rank else ""
        return (
            f"fixed shapes: one row, {self.seq} tokens of a run behind {self.past} positions{rank}"
        )


@dataclass(frozen=True)
class Part:
    """One ONNX graph of a bundle, whoever made it.

    Attributes:
        file: path of the graph, relative to the bundle, or to the folder of a capture.
        form: ``fused`` (GroupQueryAttention), ``portable`` (standard operators) or ``foreign``
            (someone else's graph).
        backend: what made the base graph: ``trace`` or ``optimum``.
        inputs: the graph's inputs beside the adapters' and the cache's. It has these; it may have
            ``position_ids`` and ``num_logits_to_keep`` besides.
        output: name of the output that counts.
        vocab_size: token ids are below it, and a decoder's logits are as many; 0: it reads none.
        max_length: longest row that its positions allow; 0: any.
        padding: the side(s) on which a batch of unequal rows may be padded.
        pad_token_id: fills up short rows; a model may tell its last token by it.
        sample: shape of ``pixel_values`` (channels, height, width) or ``input_features`` (mels,
            frames) of one row; empty where it reads tokens.
        head: module path of the layer that makes the logits of a vocabulary; empty: none does.
        cache: of its past; None: it has none.
        sites: module path -> layer with inputs for adapters; empty when merged.
        exact: path of the same graph, on the same data, that computes in float32 where ``file``
            computes in float16 or with int8 activations; empty: ``file`` computes in it itself.
        static: the same graph with fixed shapes, of a decoder in the portable form; None: there is
            none.
    """

    file: RelativePath
    form: Form
    backend: str
    inputs: tuple[str, ...]
    output: Output
    vocab_size: Vocabulary
    max_length: Positions
    padding: Padding = "right"
    pad_token_id: Token = 0
    sample: _Sample = ()
    head: str = ""
    cache: Cache | None = None
    sites: Mapping[str, SiteEntry] = field(default_factory=dict)
    exact: RelativePath | Literal[""] = ""
    static: StaticGraph | None = None

    @property
    def is_static(self) -> bool:
        """Whether ``file`` is the graph with fixed shapes."""
        return self.static is not None and self.static.file == self.file

    def in_fixed_shapes(self) -> Part:
        """The part with its graph with fixed shapes in the place of the other.

        Raises:
            ValueError: it has none.
        """
        if self.static is None:
            raise ValueError("this part has no graph with fixed shapes")
        return dataclasses.replace(self, file=self.static.file, exact="")

    def in_floats(self) -> Part:
        """The part with the graph that computes in floats in the place of the fast one."""
        return dataclasses.replace(self, file=self.exact or self.file, exact="")


@dataclass(frozen=True)
class Beginning:
    """What an encoder-decoder's answer begins with.

    Attributes:
        start: the decoder's start token, and what the checkpoint forces behind it.
        open_language: the checkpoint leaves the language of the speech open, so that ``start``
            alone does not begin a transcript.
        suppress: tokens that are never generated.
        begin_suppress: tokens that are not generated first.
    """

    start: tuple[Token, ...]
    open_language: bool = False
    suppress: tuple[Token, ...] = ()
    begin_suppress: tuple[Token, ...] = ()
