"""One decoder graph in one ONNX Runtime session.

Knows tensors and token ids; knows nothing of bundles, adapters' names or text. A graph without
adapter inputs runs alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_edge.errors import BundleError, DataError
from lora_edge.manifest import GraphSpec, SiteEntry
from lora_edge.names import LOGITS_POSITIONS, past_name, present_name
from lora_edge.runtime.binding import Binding, Tensors, check_adapter_inputs
from lora_edge.runtime.caches import ConcatenatedCache, SharedCache
from lora_edge.runtime.decoding import Decoding
from lora_edge.runtime.providers import open_session, placement, resolve

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """A session on a decoder graph, and the way its cache and padding are handled.

    Args:
        graph: the ONNX file.
        spec: the graph's facts.
        sites: module path -> site, when the graph has adapter inputs.
        provider: execution provider, strict (see :mod:`lora_edge.runtime.providers`).
        threads: intra-op threads; None leaves it to ONNX Runtime.
        optimization: ``disable``, ``basic``, ``extended`` or ``all`` (None).
        allow_fallback: let the CPU run the nodes that the provider does not take.

    Raises:
        ProviderError: the provider is missing, does not start, or would leave nodes to the CPU.
        BundleError: the graph cannot be loaded, or its inputs are not what ``spec`` and ``sites``
            say.
    """

    def __init__(
        self,
        graph: Path,
        spec: GraphSpec,
        *,
        sites: Mapping[str, SiteEntry] | None = None,
        provider: str = "cpu",
        threads: int | None = None,
        optimization: str | None = None,
        allow_fallback: bool = False,
    ) -> None:
        self.spec = spec
        self.sites = dict(sites or {})
        self.provider = resolve(provider)
        self.session = open_session(
            graph,
            self.provider,
            threads=threads,
            optimization=optimization,
            allow_fallback=allow_fallback,
        )
        types = {node.name: node.type for node in self.session.get_inputs()}
        self.inputs = frozenset(types)
        self.past_names = tuple(
            past_name(layer, part) for layer in range(spec.layers) for part in ("key", "value")
        )
        self.present_names = tuple(
            present_name(layer, part) for layer in range(spec.layers) for part in ("key", "value")
        )
        self._check_inputs(graph)
        self.cache_dtype = np.dtype(_DTYPES[types[self.past_names[0]]])
        self.tensors = Tensors(self.sites, self.provider.device, zero_rank=self.provider.zero_rank)
        self._off = self.tensors.off()

    @property
    def picks_positions(self) -> bool:
        """The graph computes the logits of chosen positions only."""
        return LOGITS_POSITIONS in self.inputs

    def start(self, batch: int, max_length: int, binding: Binding | None = None) -> Decoding:
        """A new batch of sequences with an empty cache.

        Args:
            batch: number of rows.
            max_length: longest sequence, prompt and new tokens together; the shared cache is
                allocated for it.
            binding: the adapters of the rows; None is off on every row.

        Raises:
            DataError: no rows, more positions than the model has, or a binding for another batch.
        """
        binding = self._off if binding is None else binding
        if batch < 1:
            raise DataError(f"the batch has {batch} rows, expected at least 1", "Give a prompt.")
        if not 1 <= max_length <= self.spec.max_length:
            raise DataError(
                f"{max_length} positions were asked for; the model has {self.spec.max_length}",
                "Shorten the prompt, or lower max_new_tokens.",
            )
        if binding.batch is not None and binding.batch != batch:
            raise DataError(
                f"adapters were given for {binding.batch} rows, the batch has {batch}",
                "Give one adapter, or one per row.",
            )
        kind = SharedCache if self.spec.shared_cache else ConcatenatedCache
        return kind(self, batch, max_length, binding)

    def placement(self) -> dict[str, dict[str, int]] | None:
        """Which provider runs which operators (:func:`lora_edge.runtime.providers.placement`)."""
        return placement(self.session)

    def check_ids(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse ids outside the vocabulary.

        Raises:
            DataError: the id, its row and the size of the vocabulary.
        """
        for index, row in enumerate(rows):
            for token in row:
                if not 0 <= token < self.spec.vocab_size:
                    raise DataError(
                        f"token id {token} in row {index} is outside the vocabulary of "
                        f"{self.spec.vocab_size}",
                        "Encode the text with the bundle's own tokenizer.",
                    )

    def _check_inputs(self, graph: Path) -> None:
        hint = "Export the bundle again."
        outputs = {node.name for node in self.session.get_outputs()}
        missing = {"input_ids", "attention_mask", *self.past_names} - self.inputs
        missing |= {"logits", *self.present_names} - outputs
        if missing:
            raise BundleError(f"{graph} lacks {', '.join(sorted(missing))}", hint)
        if self.spec.form == "fused" and not self.spec.shared_cache:
            raise BundleError(f"{graph}: a fused graph must take a shared cache", hint)
        check_adapter_inputs(self.inputs, self.sites, graph)
