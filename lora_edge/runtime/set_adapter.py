"""Adapters in models of optimum, and of what stands on it, such as sentence-transformers.

Knows bundles and sessions; of the libraries it knows where a model keeps its session.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from lora_edge.bundle.bundle import MANIFEST_NAME, Bundle, load_bundle
from lora_edge.bundle.manifest import aspect_names
from lora_edge.bundle.part import Part
from lora_edge.bundle.sentence import MODULES_FILE, SENTENCE_FOLDER
from lora_edge.errors import DataError, OptionError
from lora_edge.names import NONE_ADAPTER, NUM_LOGITS_TO_KEEP
from lora_edge.runtime.adapted_session import AdaptedSession
from lora_edge.runtime.adapters.active import ActiveAdapters, Choice
from lora_edge.runtime.adapters.binding import Tensors
from lora_edge.runtime.opening import checked_parts
from lora_edge.runtime.session import HALF_TENSOR
from lora_edge.targets.providers import provider, unknown

# Where a model keeps another: modules of sentence-transformers, pipelines, encoder-decoders.
_INSIDE = ("auto_model", "model", "encoder", "decoder")
_DEEP = 4


def set_adapter(model: Any, adapter: Choice = None) -> None:
    """Switch a model that another library has opened from a bundle to an adapter, or off.

    The model is one of optimum's (``ORTModelForCausalLM`` and the others), or holds one: a
    ``SentenceTransformer`` with ``backend="onnx"``, a pipeline of transformers. It is changed in
    place. Without this call the model of a switchable bundle does not run: it lacks the adapters'
    inputs.

    Args:
        model: the model.
        adapter: for all rows of each batch: a name; ``None``, no adapter (of a merged bundle, its
            own); or a blend ``{name: weight}``.

    Raises:
        OptionError: the model has no session of ONNX Runtime, or one on no graph of a bundle.
        AdapterNotFoundError: a name that the bundle does not have.
        DataError: adapters that do not blend, or no adapter where the base has no task head; an
            aLoRA; or an adapter with a tokenizer or a pooling of its own, where the model reads
            texts with the base's.
        BundleError: the bundle is damaged.
    """
    holders = list(_holders(model, _DEEP))
    if not holders:
        raise OptionError(
            f"model is a {type(model).__name__}, expected one with a session of ONNX Runtime",
            'Open it with optimum, or as SentenceTransformer(bundle, backend="onnx").',
        )
    session = holders[0].session
    kept = session.owner if isinstance(session, AdaptedSession) else None
    switch = kept if isinstance(kept, _Switch) else _Switch(holders)
    switch.to(model, adapter)


def _holders(model: Any, deep: int) -> Iterator[Any]:
    """The objects in a model that have a session."""
    if isinstance(getattr(model, "session", None), ort.InferenceSession | AdaptedSession):
        yield model
    elif deep:
        own = getattr(model, "__dict__", {})
        inside = [*own.get("_modules", {}).values(), *(own.get(name) for name in _INSIDE)]
        for each in {id(x): x for x in inside if x is not None}.values():
            yield from _holders(each, deep - 1)


class _Switch:
    """The sessions of a model and the adapters of the bundle whose graphs they run.

    Args:
        holders: the objects that have the sessions.

    Raises:
        OptionError: a session runs no graph of a bundle that takes adapters.
        BundleError: the bundle is damaged.
    """

    def __init__(self, holders: Sequence[Any]) -> None:
        self._holders = holders
        self._sessions = [each.session for each in holders]
        graphs = [_graph(session) for session in self._sessions]
        self._bundle = load_bundle(graphs[0][0])
        parts = [_part(self._bundle, *graph) for graph in graphs]
        checked_parts(self._bundle)  # the graphs, and the weights of all
        if any(name == part.exact for (_, name), part in zip(graphs, parts, strict=True)):
            checked_parts(self._bundle, exact=True)
        self._padded_left = [x.cache is None or x.padding != "right" for x in parts]
        first = self._sessions[0].get_providers()[0]
        target = provider(first) or unknown(first)
        inputs = [each for session in self._sessions for each in session.get_inputs()]
        half = any(x.type == HALF_TENSOR and x.name.startswith("lora.") for x in inputs)
        tensors = Tensors(
            self._bundle.manifest.sites,
            zero_rank=target.zero_size is True,
            dtype=np.float16 if half else np.float32,
        )
        self._active = ActiveAdapters(self._bundle, tensors)

    def to(self, model: Any, adapter: Choice) -> None:
        """Feed an adapter from now on; of what is refused, nothing is changed."""
        (state,) = self._active.states(adapter, 1)
        names = [name for name, _ in state]
        bound = self._active.binding(adapter, 1)
        if bound.token_gates is not None:
            raise DataError(
                f"{names[0]} is an aLoRA: where it is active depends on the prompt, which a "
                "session does not know",
                "Use lora_edge.Runner.",
            )
        self._check_texts(model, names)
        # Copies: what numpy() gives may be a view, and dies with the binding.
        arrays = {name: np.array(value.numpy()) for name, value in bound.values.items()}
        arrays[NUM_LOGITS_TO_KEEP] = np.array(0, np.int64)  # of every column
        for place in zip(self._holders, self._sessions, self._padded_left, strict=True):
            self._feed(*place, arrays)
        if bound.labels:
            self._name_labels(model, names, bound.labels[0])

    def _feed(
        self, holder: Any, session: Any, padded_left: bool, arrays: Mapping[str, Any]
    ) -> None:
        order = [each.name for each in session.get_inputs()]
        fed = {name: arrays[name] for name in order if name in arrays}
        holder.session = AdaptedSession(session, fed, padded_left=padded_left, owner=self)
        # Those that the library gives, with their places.
        holder.input_names = {x: index for index, x in enumerate(order) if x not in fed}
        holder.use_io_binding = False

    def _check_texts(self, model: Any, names: Sequence[str]) -> None:
        """An adapter that reads texts in its own way is refused where the model reads them."""
        manifest = self._bundle.manifest
        reads = getattr(model, "tokenizer", None) is not None
        for name in names:
            modules = f"adapters/{name}/{SENTENCE_FOLDER}/{MODULES_FILE}" in manifest.files
            own = (
                [aspect_names(manifest.adapters[name].text)] if manifest.adapters[name].text else []
            )
            own += ["sentence-transformers files"] if modules else []
            if own and reads:
                raise DataError(
                    f"adapter {name!r} brings its own {' and '.join(own)}, and the model reads "
                    "texts as the base does",
                    "Use lora_edge.Runner, or export the adapter merged.",
                )
            if own:
                warnings.warn(
                    f"adapter {name!r} brings its own {' and '.join(own)}, which are in "
                    f"{self._bundle.directory / 'adapters' / name}: read texts with them",
                    stacklevel=4,
                )

    def _name_labels(self, model: Any, names: Sequence[str], count: int) -> None:
        """Put the labels of the head into the model's config, where pipelines read them."""
        adapters = self._bundle.manifest.adapters
        known = [adapters[name].labels for name in (*names, NONE_ADAPTER)]
        labels = next((x for x in known if len(x) == count), [f"LABEL_{i}" for i in range(count)])
        for each in (model, *self._holders):
            config: Any = getattr(each, "config", None)
            if hasattr(config, "id2label"):
                config.id2label = dict(enumerate(labels))
                config.label2id = {label: index for index, label in enumerate(labels)}


def _graph(session: Any) -> tuple[Path, str]:
    """The folder of a session's bundle, and the path of the graph in it."""
    path = getattr(session, "_model_path", None)
    if path:
        file = Path(path).absolute()
        root = next((x for x in file.parents if (x / MANIFEST_NAME).is_file()), None)
        if root is not None:
            return root, file.relative_to(root).as_posix()
    raise OptionError(
        f"the model runs {path or 'a graph from memory'}, which is in no bundle",
        "Open it from a bundle: ….from_pretrained(bundle).",
    )


def _part(bundle: Bundle, root: Path, file: str) -> Part:
    """The part whose graph a file is."""
    found = next((x for x in bundle.manifest.parts.values() if file in (x.file, x.exact)), None)
    if found is None or root != bundle.directory:
        raise OptionError(
            f"the model runs {root / file}, which is not the graph of the bundle that takes "
            "adapters",
            f"Open {bundle.manifest.gives.file}: leave file_name out.",
        )
    return found
