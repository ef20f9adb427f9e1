"""The public face: a bundle in a session, adapters by name, logits and text out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_edge import types as opt
from lora_edge.bundle.bundle import Bundle, load_bundle
from lora_edge.bundle.part import Part
from lora_edge.errors import BundleError, DataError, OptionError
from lora_edge.maths.lora import FloatArray
from lora_edge.names import NONE_ADAPTER
from lora_edge.runtime.adapters.active import ActiveAdapters, AdapterArgument, Choice
from lora_edge.runtime.adapters.binding import Binding, State, Tensors
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.finite import finite
from lora_edge.runtime.generation import Generation, begin, check_room
from lora_edge.runtime.opening import checked_parts, open_parts, runs_static
from lora_edge.runtime.pinned import PinnedSessions
from lora_edge.runtime.prefixes import Prefixes
from lora_edge.runtime.providers import LEVELS
from lora_edge.runtime.resident import CACHE_BYTES, Resident, SizedCache
from lora_edge.runtime.routes import Routes
from lora_edge.runtime.rows import token_rows
from lora_edge.runtime.sampling import Sampling
from lora_edge.runtime.session import ModelSession
from lora_edge.runtime.text.completions import Prompt, as_list, encode, new_ids, pieces
from lora_edge.runtime.text.defaults import GenerationDefaults, choices
from lora_edge.runtime.text.texts import Texts
from lora_edge.runtime.text.tokenizer import Tokenizer
from lora_edge.tasks.task import Driver

if TYPE_CHECKING:
    from lora_edge.runtime.decoding import Decoding
    from lora_edge.runtime.encoder import Encoder
    from lora_edge.runtime.outputs.outputs import Label, Outputs, TextInput, TokenLabel
    from lora_edge.runtime.seq2seq import Seq2Seq

Session = TypeVar("Session", bound=ModelSession)


class Runner:
    """Runs a bundle: one graph, any of its adapters.

    Wherever ``adapter`` is asked for, it is one of these, or a list with one per row of the batch:

    * ``None``: the bundle as it is. Switchable: no adapter, the base. Merged: its adapter, which is
      in the weights and cannot be taken out.
    * a name: that adapter; ``"none"`` is no adapter. A merged bundle takes its own adapter's name
      only.
    * ``{name: weight, ...}``: the weighted sum of the adapters' effects.

    Args:
        bundle: the bundle's folder, or an open :class:`~lora_edge.bundle.bundle.Bundle`.
        provider: execution provider, e.g. ``cpu`` or ``cuda``; strict: it runs, or an error says
            why not.
        threads: intra-op threads; None leaves it to ONNX Runtime (one per physical core).
        optimization: ONNX Runtime's graph optimizations: ``disable``, ``basic``, ``extended``,
            ``all`` (None).
        allow_fallback: let the CPU run nodes that the provider does not take; those that work on
            shapes only may stay there in any case.
        provider_options: the provider's own, name -> value, e.g. ``{"device_id": "1"}``; of a
            provider from a package of its own, ``device`` chooses ``cpu``, ``gpu`` or ``npu``.
        pinned: adapters that get a session of their own, with their changes in its weights: a batch
            whose rows all use one of them at weight 1 runs as fast as a merged bundle. None stands
            for no adapter. Each costs one more copy of the weights in memory, and a second one of
            those that it changes; the sessions are opened when first needed. Everything else runs
            on the switchable graph as ever. For bundles that generate text, and adapters that
            change nothing but weights of linear layers and untied embeddings: LoRA and DoRA.

        session_cache: keep ONNX Runtime's optimized graph, with its weights as the kernels of this
            processor read them, in this folder; True: in the user's cache, or where
            ``LORA_EDGE_CACHE`` says; False: nowhere. Of 32 MiB of weights and more, on the CPU:
            opening it again takes a fraction of the time, sessions share one mapped file, and a
            batch with one adapter, or none, runs on a smaller graph.
        verify: ``full``: check every byte of the bundle against its hashes first. ``sampled``:
            weights of more than 16 MiB by some of their blocks, which shows another or a damaged
            file, and may not show a few changed bytes; everything else by its hash when it is
            first used.
        cache_bytes: what is kept in memory for its next use is at most so much: adapters, blends
            and mixed batches, and the KV buffers of finished runs. The longest unused goes first
            and is made again when it is asked for. What is in use is not counted.
        keep: adapters that are loaded now and stay, whatever ``cache_bytes`` says.
        prefix_bytes: keep the keys and values of prompts, up to so many bytes beside
            ``cache_bytes``: :meth:`generate`, :meth:`stream` and :meth:`generate_ids` run only the
            rest of a prompt that begins like an earlier one under the same adapters. 0 keeps none:
            a prompt in two parts may give other last bits than the whole. Of bundles with one
            decoder and a cache, on the CPU provider; elsewhere it does nothing.
        exact: run the graph that computes in floats, which is the one that is proved; slower. A
            bundle whose graph computes in floats itself runs as ever. Not with ``pinned``.
        static: run the graph with fixed shapes, if the bundle has one: rows one after the other,
            each of as many tokens as the graph has room for, in one adapter or in a blend of no
            larger rank than the graph's. None: where the provider takes fixed shapes only. Not
            with ``pinned``.
        native: where ``lora-edge native build`` has built its library, batches with one adapter or
            with one for each row run on it; ``LORA_EDGE_NATIVE=0`` turns it off too.

    Raises:
        AdapterNotFoundError: a name in ``pinned`` or ``keep`` that the bundle does not have.
        DataError: an adapter that cannot be pinned; the message says why.
        BundleError: the folder is not a bundle, or a file is missing, damaged or cut off.
        ProviderError: the provider is not available, does not start, or would leave work on floats
            to the CPU.
    """

    foreign: ClassVar[bool] = False
    """Its graph runs in another runtime, which cannot be given other tensors for an adapter."""

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        provider: str = "cpu",
        *,
        threads: int | None = None,
        optimization: str | None = None,
        allow_fallback: bool = False,
        provider_options: Mapping[str, str] | None = None,
        pinned: Sequence[str | None] = (),
        session_cache: bool | str | os.PathLike[str] = True,
        verify: Literal["sampled", "full"] = "sampled",
        cache_bytes: int = CACHE_BYTES,
        keep: Sequence[str] = (),
        prefix_bytes: int = 0,
        exact: bool = False,
        native: bool = True,
        static: bool | None = None,
    ) -> None:
        opt.text("provider", provider)
        if threads is not None:
            opt.whole("threads", threads, 1, opt.MOST_THREADS)
        if optimization is not None:
            opt.one_of("optimization", optimization, LEVELS)
        opt.flag("allow_fallback", allow_fallback)
        provider_options = opt.pairs("provider_options", provider_options or {})
        opt.one_of("verify", verify, ("sampled", "full"))
        cache_bytes = opt.whole("cache_bytes", cache_bytes, 0)
        keep = opt.texts("keep", keep)
        prefix_bytes = opt.whole("prefix_bytes", prefix_bytes, 0)
        opt.flag("exact", exact)
        opt.flag("native", native)
        if static is not None:
            opt.flag("static", static)
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        if verify == "full":
            self.bundle.verify_all()
        self._cache = SizedCache(cache_bytes)
        options: dict[str, Any] = {
            "provider": provider,
            "threads": threads,
            "optimization": optimization,
            "allow_fallback": allow_fallback,
            "provider_options": provider_options,
            "resident": self._cache,
        }
        if exact and pinned and any(part.exact for part in self.bundle.manifest.parts.values()):
            raise DataError(
                "nothing can be pinned with exact: pinned sessions compute with int8 activations, "
                "or in float16",
                "Leave out one of the two.",
            )
        self._static = runs_static(self.bundle, provider, static)
        if self._static and pinned:
            raise DataError(
                "nothing can be pinned on the graph with fixed shapes", "Leave out one of the two."
            )
        from lora_edge.runtime.prepared import prepared_graphs  # its imports take time

        prepared = prepared_graphs(self.bundle, session_cache)
        whole = optimization is None and not self._static
        kept = prepared if provider == "cpu" and whole else None
        options["prepared"] = kept
        self._exact, self._options = exact, options
        manifest = self.bundle.manifest
        branched = manifest.mode == "switchable" and self.driver == "decoder"
        routed = kept if branched and not exact else None
        if routed is None:
            tensors = self.session.tensors
        else:  # sessions are opened when first needed; what is damaged is told now
            kind = np.float16 if manifest.precision == "fp16" else np.float32
            tensors = Tensors(checked_parts(self.bundle)["decoder"].sites, dtype=kind)
        self._active = ActiveAdapters(self.bundle, tensors, self._cache, keep)
        self._pinned = PinnedSessions(
            self.bundle, lambda: self.decoder, self._active, pinned, options
        )
        self._routes = None
        if routed is not None:
            from lora_edge.runtime.native.library import find  # as prepared's

            self._routes = Routes(
                self.bundle,
                lambda: self.decoder,
                self._active,
                routed,
                options,
                find() if native else None,
            )
        invocations = {name: entry.invocation for name, entry in manifest.adapters.items()}
        self._prefixes = Prefixes(prefix_bytes, invocations, lambda: self._active.generation)
        for name in keep:
            self._active.load(name)

    def _session_for(self, adapter: AdapterArgument, batch: int) -> tuple[Decoder, Binding]:
        """Where a batch of text runs, and what is bound there; raises as :meth:`binding`."""
        states = self._active.states(adapter, batch)
        found = self._pinned.find(states)
        if found is not None:
            return found
        routed = None if self._routes is None else self._routes.find(states)
        return routed or (self.decoder, self._active.binding_of(states))

    def start(self, adapter: AdapterArgument, batch: int, max_length: int) -> Decoding:
        """A new batch of text with an empty cache, to be stepped by hand.

        Args:
            adapter: see the class.
            batch: number of rows.
            max_length: longest sequence, prompt and new tokens together.

        Raises:
            BundleError: the bundle has another task.
            AdapterNotFoundError: a name that the bundle does not have.
            DataError: more positions than the model has or the memory holds.
        """
        decoder, bound = self._session_for(adapter, batch)
        return decoder.start(batch, max_length, bound)

    @cached_property
    def session(self) -> ModelSession:
        """The session on the bundle's own graphs."""
        return open_parts(self.bundle, self._options, exact=self._exact, static=self._static)

    @property
    def decoder(self) -> Decoder:
        """The session of a bundle that generates text.

        Raises:
            BundleError: the bundle has another task.
        """
        return self._driven(
            Decoder,
            {
                "encoder": ("generates no text", "Use logits(), classify() or embed()."),
                "encoder-decoder": (
                    "has an encoder and a decoder",
                    "Use generate(), generate_ids() or seq2seq_logits().",
                ),
            },
        )

    @property
    def encoder(self) -> Encoder:
        """The session of a bundle of labels or embeddings.

        Raises:
            BundleError: the bundle generates text.
        """
        from lora_edge.runtime.encoder import Encoder

        said = ("has no labels", "Use logits() or generate().")
        return self._driven(Encoder, {"decoder": said, "encoder-decoder": said})

    @property
    def seq2seq(self) -> Seq2Seq:
        """The sessions of a bundle of an encoder-decoder.

        Raises:
            BundleError: the bundle has another task.
        """
        from lora_edge.runtime.seq2seq import Seq2Seq

        said = ("is one graph", "Use logits().")
        return self._driven(Seq2Seq, {"decoder": said, "encoder": said})

    def _driven(self, kind: type[Session], said: Mapping[Driver, tuple[str, str]]) -> Session:
        """The session, if it is of this kind; else an error that says what there is instead."""
        if type(self.session) is kind:
            return self.session
        raise _wrong_task(self.bundle, *said[self.driver])

    @property
    def driver(self) -> Driver:
        """What runs the bundle's parts."""
        return self.bundle.manifest.driver

    @cached_property
    def outputs(self) -> Outputs:
        """What an encoder bundle gives for texts and images; raises as :attr:`encoder`."""
        from lora_edge.runtime.outputs.outputs import Outputs

        return Outputs(
            self.bundle, self.encoder, lambda state: self._texts.tokenizer(state, chat=False)
        )

    @property
    def part(self) -> Part:
        """The facts of the graph of a bundle that generates text."""
        return self.decoder.part

    @property
    def room(self) -> int | None:
        """Tokens that a row may have on the graph with fixed shapes; None: another one runs."""
        static = self.bundle.manifest.reads.static
        return static.room if self._static and static is not None else None

    @property
    def graph_file(self) -> str:
        """The first graph that runs, relative to the bundle."""
        return next(iter(self.session.parts.values())).file

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the bundle's adapters, sorted; without ``none``."""
        return tuple(sorted(set(self.bundle.manifest.adapters) - {NONE_ADAPTER}))

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self.bundle)

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            BundleError: it has none, or its files are damaged.
        """
        return self._texts.tokenizer()

    def tokenizer_of(self, adapter: Choice) -> Tokenizer:
        """The tokenizer of rows that use an adapter: its own where it brought one.

        Args:
            adapter: a choice for one row, see the class.

        Raises:
            AdapterNotFoundError: a name that the bundle does not have.
            DataError: a blend of adapters that read text in different ways.
            BundleError: there is no tokenizer, or its files are damaged.
        """
        return self._texts.tokenizer(self._active.states(adapter, 1)[0])

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The token ids that end a completion of the base."""
        return self._texts.eos_ids()

    def eos_of(self, adapter: Choice) -> frozenset[int]:
        """The token ids that end a row of an adapter: the base's, and its own end token.

        Raises:
            As :meth:`tokenizer_of`.
        """
        return self._eos(self._active.states(adapter, 1))[0]

    def _eos(self, states: Sequence[State]) -> list[frozenset[int]]:
        return [self._texts.eos_ids(state) | self.eos_ids for state in states]

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """What the model's ``generation_config.json`` says of generation.

        Raises:
            BundleError: the file is damaged.
        """
        return self._texts.defaults

    def resident(self) -> Resident:
        """What is kept in memory for its next use, and its bytes."""
        held = self._prefixes
        return self._cache.report()._replace(prefixes=held.bytes, prefix_limit=held.limit)

    def binding(self, adapter: AdapterArgument, batch: int) -> Binding:
        """What is bound for a batch, for use with :attr:`decoder`.

        Raises:
            AdapterNotFoundError: a name that the bundle does not have.
            DataError: a list of another length than the batch, or a weight that is not finite.
            BundleError: an adapter's file is damaged, or it was made for another base.
        """
        return self._active.binding(adapter, batch)

    def states(self, adapter: AdapterArgument, batch: int) -> tuple[State, ...]:
        """The adapters and weights of each row of a batch; raises as :meth:`binding`."""
        return self._active.states(adapter, batch)

    def override(self, name: str, tensors: Mapping[str, NDArray[np.floating]] | None) -> None:
        """Use other tensors for an adapter from now on, in this process only; None undoes it.

        Args:
            name: an adapter of the bundle.
            tensors: graph input name -> array: ``A [in, R]`` and ``B [R, out]`` of every site.

        Raises:
            AdapterNotFoundError: the bundle has no such adapter.
            BundleError: the tensors do not fit the graph's sites.
            DataError: the bundle is merged, the name is ``none``, or the adapter is pinned.
        """
        opt.text("name", name)
        if tensors is not None and not isinstance(tensors, Mapping):
            raise opt.refused("tensors", tensors, "a mapping of graph inputs to arrays, or None")
        for key, array in (tensors or {}).items():
            if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
                raise opt.refused(f"tensors[{opt.text('a name', key)!r}]", array, "a float array")
        if name in self._pinned.names:
            raise DataError(
                f"the tensors of {name!r} cannot be replaced: it is pinned, and in the weights",
                "Open a Runner without it in pinned.",
            )
        self._active.override(name, tensors)
        self._prefixes.forget()

    def logits(
        self,
        input_ids: ArrayLike | Sequence[Sequence[int]],
        attention_mask: ArrayLike | None = None,
        adapter: AdapterArgument = None,
        *,
        token_type_ids: ArrayLike | None = None,
    ) -> FloatArray:
        """The logits after every token; of an encoder, its output.

        Args:
            input_ids: ``[batch, seq]`` integers, or a list of rows of unequal lengths.
            attention_mask: ``[batch, seq]`` of 0 and 1, padded on the left or on the right; None is
                all ones. Not for rows of unequal lengths.
            adapter: see the class.
            token_type_ids: ``[batch, seq]`` for an encoder that takes them; None is all zeros.

        Returns:
            ``[batch, seq, vocab] float32`` in the layout of ``input_ids`` (rows of unequal lengths
            start at 0); zeros where the mask is 0. Of an encoder ``[batch, labels]``, ``[batch,
            seq, labels]`` or, for feature extraction, ``[batch, seq, hidden]``; rows with fewer
            labels than others are filled up with zeros.

        Raises:
            AdapterNotFoundError: a name that the bundle does not have.
            DataError: an empty or too long row, an id outside the vocabulary, a mask with holes;
                logits that are NaN or infinite.
        """
        rows, starts, width = token_rows(input_ids, attention_mask)
        if self.driver == "encoder":
            binding = self.binding(adapter, len(rows))
            return finite(self.outputs.logits(rows, starts, width, token_type_ids, binding))
        if token_type_ids is not None:
            raise OptionError(
                "token_type_ids is for encoders, and this bundle's model takes none",
                "Leave it out.",
            )
        decoder, bound = self._session_for(adapter, len(rows))
        decoding = decoder.start(len(rows), max(map(len, rows)), bound)
        out = np.zeros((len(rows), width, decoder.part.vocab_size), np.float32)
        for index, values in enumerate(decoding.extend_all(rows)):
            out[index, starts[index] : starts[index] + len(values)] = finite(values)
        return out

    def seq2seq_logits(
        self,
        inputs: Sequence[Sequence[int]] | NDArray[np.float32],
        decoder_input_ids: Sequence[Sequence[int]],
        adapter: AdapterArgument = None,
    ) -> FloatArray:
        """The logits of an encoder-decoder after every token that its decoder is given.

        Args:
            inputs: rows of token ids, special tokens included, which may be of unequal lengths; or
                ``input_features [batch, mels, frames] float32``.
            decoder_input_ids: what the decoder has said so far, for each row, its start token
                first (``bundle.manifest.beginning.start``); may be of unequal lengths.
            adapter: see the class.

        Returns:
            ``[batch, seq, vocab] float32``; zeros behind the end of shorter rows.

        Raises:
            BundleError: the bundle has another task.
            AdapterNotFoundError: a name that the bundle does not have.
            DataError: rows that are empty, too long or outside the vocabulary, or features of
                another shape.
        """
        session = self.seq2seq
        binding = self.binding(adapter, len(opt.listed("inputs", inputs)))
        found = session.logits(inputs, decoder_input_ids, binding)
        out = np.zeros((len(found), max(map(len, found)), found[0].shape[-1]), np.float32)
        for index, values in enumerate(found):
            out[index, : len(values)] = finite(values)
        return out

    def classify(
        self,
        inputs: Sequence[Any],
        adapter: AdapterArgument = None,
    ) -> list[list[Label]] | list[list[TokenLabel]]:
        """Label texts or images, as one batch.

        Args:
            inputs: texts, or tuples of two texts; image files, ``PIL`` images or
                ``[height, width, 3] uint8`` arrays for image classification.
            adapter: see the class.

        Returns:
            For each input all labels with their scores, best first; for token classification the
            best label of each token.

        Raises:
            BundleError: the bundle's task is another.
            AdapterNotFoundError: a name that the bundle does not have.
            DataError: an input that is none, or no adapter where the base has no task head.
        """
        if self.encoder.part.output != "logits":
            raise _wrong_task(self.bundle, "has no labels", "Use embed() or logits().")
        if len(opt.listed("inputs", inputs)) == 0:
            raise DataError("there is nothing to classify", "Give at least one text or image.")
        binding = self.binding(adapter, len(inputs))
        states = self._active.states(adapter, len(inputs))
        return self.outputs.classify(inputs, binding, states)

    def embed(
        self,
        texts: Sequence[TextInput],
        adapter: AdapterArgument = None,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> FloatArray:
        """Sentence embeddings, pooled as the model's sentence-transformers files say (else mean).

        Args:
            texts: texts, or tuples of two texts.
            adapter: see the class.
            prompt: put in front of each text; ``None``: of ``prompt_name``, else the files'
                default; ``""``: none.
            prompt_name: name of one of the files' prompts, e.g. ``query``.

        Returns:
            ``[batch, hidden] float32``; ``modes * hidden`` where the files name several ways of
            pooling.

        Raises:
            OptionError: there is no such prompt, or both are given.
            As :meth:`classify`.
        """
        if self.encoder.part.output != "last_hidden_state":
            raise _wrong_task(self.bundle, "gives no embeddings", "Use classify() or logits().")
        if len(opt.listed("texts", texts)) == 0:
            raise DataError("there is nothing to embed", "Give at least one text.")
        if prompt is not None and prompt_name is not None:
            raise OptionError("prompt and prompt_name are both given", "Give one of them.")
        binding = self.binding(adapter, len(texts))
        states = self._active.states(adapter, len(texts))
        return self.outputs.embed(texts, binding, states, prompt, prompt_name)

    def generate(
        self,
        prompts: str | Sequence[Prompt] | NDArray[np.float32],
        adapter: AdapterArgument = None,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        defaults: Literal["model"] | None = None,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        start: Sequence[int] | None = None,
    ) -> list[str]:
        """Complete prompts, as one batch; of an encoder-decoder, answer or transcribe them.

        An encoder-decoder runs on the whole of what it has said at each token.

        Args:
            prompts: texts; with ``chat`` also conversations (lists of ``{"role", "content"}``); for
                speech ``input_features [batch, mels, frames] float32``.
            adapter: see the class.
            max_new_tokens: at most so many new tokens a prompt; None is 64.
            temperature: 0, or None, is greedy.
            top_k: sample from the k likeliest tokens; 0, or None, is all.
            top_p: sample from the likeliest tokens that hold this probability; 1, or None, is all.
            seed: same seed and prompt, same text, whatever else is in the batch.
            min_p: sample from the tokens that are at least so many times as likely as the
                likeliest; 0, or None, is all.
            repetition_penalty: above 1, tokens that a row has already become less likely; 1, or
                None, is none.
            defaults: ``"model"``: what is None is as the model's ``generation_config.json`` says;
                a UserWarning names what it says and is not followed.
            stop: a completion ends before the first of these strings.
            chat: put the prompts through the chat template, of the adapter if it brought one.
            tools: JSON schemas of tools, for the chat template.
            documents: documents, for the chat template.
            start: what the decoder of an encoder-decoder begins with, instead of what its
                checkpoint says: e.g. Whisper's tokens for a language and a task.

        Returns:
            The completions, without the prompts, special tokens and stop strings.

        Raises:
            AdapterNotFoundError: a name that the bundle does not have.
            DataError: an empty prompt, one that leaves no room for ``max_new_tokens``, a setting
                outside its range or for another task, or ``chat`` without a template.
        """
        given = _given(temperature, top_k, top_p, seed, min_p, repetition_penalty)
        chosen = self._choices(defaults, given, max_new_tokens)
        count, said = self._completions(
            prompts, adapter, chosen, stop, chat=chat, tools=tools, documents=documents, start=start
        )
        texts = [""] * count
        for row, piece in said:
            texts[row] += piece
        return texts

    def stream(
        self,
        prompt: Prompt | NDArray[np.float32],
        adapter: AdapterArgument = None,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        defaults: Literal["model"] | None = None,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        start: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """Complete one prompt, piece by piece as it becomes certain.

        Speech is ``[1, mels, frames] float32``. The pieces' concatenation is what :meth:`generate`
        returns; arguments and errors are its own.
        """
        given = _given(temperature, top_k, top_p, seed, min_p, repetition_penalty)
        chosen = self._choices(defaults, given, max_new_tokens)
        one = prompt if self._hears else [prompt]
        _, said = self._completions(
            one, adapter, chosen, stop, chat=chat, tools=tools, documents=documents, start=start
        )
        return (piece for _, piece in said if piece)

    def generate_ids(
        self,
        rows: Sequence[Sequence[int]] | NDArray[np.float32],
        adapter: AdapterArgument = None,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        defaults: Literal["model"] | None = None,
        start: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """As :meth:`generate` on token ids: each row's new ids, its end token included."""
        given = _given(temperature, top_k, top_p, seed, min_p, repetition_penalty)
        chosen = self._choices(defaults, given, max_new_tokens)
        ids: Any = rows if self._hears else token_rows(rows, None)[0]
        return new_ids(self._generation(ids, adapter, chosen, start), len(ids))

    def _choices(
        self, defaults: str | None, given: Mapping[str, Any], max_new_tokens: int | None
    ) -> tuple[Sampling, int]:
        """How tokens are chosen, and how many at most."""
        if max_new_tokens is not None:
            max_new_tokens = opt.whole("max_new_tokens", max_new_tokens, 1)
        if defaults not in (None, "model"):
            raise OptionError(
                f"defaults is {defaults!r:.100}, expected 'model' or None",
                "'model' follows the model's generation_config.json.",
            )
        model = None if defaults is None else self.generation_defaults
        if model is not None and model.not_followed:
            warnings.warn(
                "the model's generation_config.json says what is not followed: "
                + ", ".join(model.not_followed),
                stacklevel=3,
            )
        return choices(model, given, max_new_tokens)

    def _completions(
        self,
        prompts: Any,
        adapter: AdapterArgument,
        chosen: tuple[Sampling, int],
        stop: str | Sequence[str],
        *,
        chat: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        start: Sequence[int] | None,
    ) -> tuple[int, Iterator[tuple[int, str]]]:
        """How many prompts there are; and (row, text) as it becomes certain.

        Errors in the arguments are raised here and now.
        """
        stops = _checked(stop, chat, tools, documents)
        rows = self._read(prompts, adapter, chat, tools=tools, documents=documents)
        generation = self._generation(rows, adapter, chosen, start)
        tokenizers = self._tokenizers(adapter, len(rows), chat=False)
        return len(rows), pieces(generation, len(rows), [one.decode for one in tokenizers], stops)

    def _generation(
        self,
        rows: Any,
        adapter: AdapterArgument,
        chosen: tuple[Sampling, int],
        start: Sequence[int] | None,
    ) -> Generation:
        """What an encoder-decoder answers to rows or speech, or how a decoder goes on."""
        sampling, max_new_tokens = chosen
        batch = len(opt.listed("inputs", rows))
        eos_ids = self._eos(self._active.states(adapter, batch))
        beginning = self.bundle.manifest.beginning
        if beginning is not None:
            session = self.seq2seq
            if start is not None:
                (start,), _, _ = token_rows([start], None)
            begun = begin(beginning, start)
            decoding = session.answer(rows, self.binding(adapter, batch))
            check_room(len(begun), max_new_tokens, session.part.max_length)
            return Generation(
                decoding,
                [begun] * batch,
                max_new_tokens=max_new_tokens,
                eos_ids=eos_ids,
                sampling=sampling,
                keys=session.keys(rows),
                suppress=beginning.suppress,
                begin_suppress=beginning.begin_suppress,
            )
        if start is not None:
            raise DataError("start is for encoder-decoders only", "Put it into the prompt.")
        adapters_of = self._active.generation  # before they are bound
        decoder, bound = self._session_for(adapter, batch)
        longest = max(map(len, rows), default=0)
        static = decoder.static
        limit = decoder.part.max_length if static is None else static.room
        check_room(longest, max_new_tokens, limit, decoder.whose)
        decoding = decoder.start(batch, longest + max_new_tokens, bound)
        return Generation(
            self._prefixes.reused(decoding, adapters_of),
            rows,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            sampling=sampling,
        )

    @property
    def _hears(self) -> bool:
        """Whether prompts are speech."""
        manifest = self.bundle.manifest
        return manifest.beginning is not None and bool(manifest.reads.sample)

    def _read(self, prompts: Any, adapter: AdapterArgument, chat: bool, **context: Any) -> Any:
        """The token ids of prompts; speech as it is."""
        if not self._hears:
            return self._encode(prompts, adapter, chat, **context)
        if chat:
            raise DataError("chat is for text, and the bundle hears speech", "Leave it out.")
        return prompts

    def _encode(
        self, prompts: Any, adapter: AdapterArgument, chat: bool, **context: Any
    ) -> list[list[int]]:
        if self.driver == "encoder":
            _ = self.decoder  # says what the bundle does instead
        listed = as_list(prompts, chat)
        return encode(listed, self._tokenizers(adapter, len(listed), chat), chat, **context)

    def _tokenizers(self, adapter: AdapterArgument, batch: int, chat: bool) -> list[Tokenizer]:
        states = self._active.states(adapter, batch)
        return [self._texts.tokenizer(state, chat=chat) for state in states]


def _checked(
    stop: str | Sequence[str],
    chat: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
) -> Sequence[str]:
    """The stop strings; refuses what is of another type."""
    opt.flag("chat", chat)
    for name, given in (("tools", tools), ("documents", documents)):
        for each in opt.listed(name, given if given is not None else ()):
            if not isinstance(each, Mapping):
                raise opt.refused(f"an entry of {name}", each, "a mapping")
    stops = opt.texts("stop", stop)
    if "" in stops:
        raise opt.refused("stop", stop, "strings that are not empty")
    return stops


def _given(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }


def _wrong_task(bundle: Bundle, what: str, hint: str) -> BundleError:
    return BundleError(f"the bundle's task is {bundle.manifest.task}: it {what}", hint)
