"""The models of the reference: loaded, rounded, with adapters attached, switched between states.

Beside ``peft_models``, ``peft_layers``, ``by_layer`` and ``around/reference``, the only file of
this package that imports torch, transformers or peft. PEFT's own merge is not used: it is wrong for
tied embeddings.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_edge.adapter.directory import read_config
from lora_edge.base.checkpoint import Base
from lora_edge.base.layers import built_layers
from lora_edge.errors import MissingDependencyError, OptionError
from lora_edge.files.spilled import let_go, moved
from lora_edge.maths.quantization import Blocks, Quantization
from lora_edge.parity.merging import merged_changes
from lora_edge.parity.peft_models import (
    attached,
    base_of,
    running,
    scaled,
    stands_apart,
    widened,
    without_low_rank,
)
from lora_edge.parity.plan.states import BASE, State
from lora_edge.tasks.task import TEXT, Task

if TYPE_CHECKING:
    from lora_edge.parity.by_layer import ByLayer

_KEPT = 50_000_000  # parameters of models that are kept for adapters that stand apart


def libraries() -> tuple[Any, dict[str, str]]:
    """torch, and the versions of torch, transformers and peft.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"checking against PyTorch needs {error.name}",
            "Install it with: pip install 'lora-edge[export]'.",
        ) from error
    return torch, {
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "peft": str(peft.__version__),
    }


class ReferenceModels:
    """A base model in PyTorch, float32, eager attention, with PEFT adapters attached by name."""

    def __init__(
        self, base: Base, task: Task = TEXT, quantization: Quantization | None = None
    ) -> None:
        """Load the model.

        Args:
            base: the model's folder.
            task: what it is to do.
            quantization: round the weights of these layers first.

        Raises:
            MissingDependencyError: torch, transformers or peft is not installed.
            BaseModelError: transformers cannot load the folder, or it lacks more than the head.
        """
        self._torch, self.versions = libraries()
        from lora_edge.base.mapped import Mapped  # these import torch
        from lora_edge.parity.by_layer import WHOLE, ByLayer

        self.base = base
        self.task = task
        self._quantization: Quantization | None = None
        self.large = base.size > WHOLE
        self._shared: Any = self._load(task, stored=self.large)
        # How a large model runs, and one that an adapter has for itself.
        self.mapped = Mapped(self._shared, base.files)
        self._by_layer = ByLayer(self.mapped)
        self._by_layer_apart: dict[str, ByLayer] = {}
        self._size = sum(int(parameter.numel()) for parameter in self._shared.parameters())
        self.label_layer: str = task.label_layer(self._shared)
        self.architecture = type(self._shared).__name__
        # What ends with the block of wide(), and the models that are float64 in it.
        self._widening: contextlib.ExitStack | None = None
        self._widened: set[int] = set()
        self._names: dict[str, str] = {}
        self._state: State | None = None  # what is active in the shared model; None: not known
        self._unscale = contextlib.ExitStack()
        self._set: list[str] = []  # what PEFT has set, active or off
        self._on = False  # whether PEFT's layers are known not to be off
        self._apart: dict[str, tuple[Path, Task]] = {}
        self._invocations: dict[str, tuple[int, ...]] = {}
        # Adapters that stand apart, each with a base model of its own, the last used last.
        self._loaded: dict[str, Any] = {}
        if quantization is not None:
            self.round(quantization)

    @property
    def parameters(self) -> int:
        """Number of the base model's parameters."""
        return self._size

    def matrices(self) -> frozenset[str]:
        """Paths of the base's parameters of two dimensions and more; of a tied one each."""
        named = self._shared.named_parameters(remove_duplicate=False)
        return frozenset(name for name, x in named if _is_matrix(x))

    @property
    def bare(self) -> Any:
        """transformers' model, as the checkpoint is: before it is rounded or adapters attached.

        Raises:
            OptionError: that was done already.
        """
        if self._names or self._apart or self._quantization is not None:
            raise OptionError(
                "the reference has adapters already, or rounded weights",
                "Open another one, or give the base's folder.",
            )
        return self._shared

    def round(self, quantization: Quantization) -> None:
        """Give the layers the values that their codes mean, as PEFT sees a quantized layer.

        Before any adapter is attached. One that is to be merged first is merged into the values of
        the checkpoint, in a model of its own, and what comes of it is rounded.
        """
        self._quantization = quantization
        self._rounded(self._shared, self._by_layer)

    @property
    def _merged_first(self) -> bool:
        return self._quantization is not None and self._quantization.merged_first

    def attach(
        self, name: str, directory: str | os.PathLike[str], num_labels: int | None = None
    ) -> None:
        """Load a PEFT directory under ``name``; it is inactive until a state asks for it.

        What PEFT cannot hold beside other adapters (biases, ``modules_to_save``, …) gets a base
        model of its own, loaded when a state first asks for it.

        Args:
            name: what states call it.
            directory: of PEFT's files.
            num_labels: size of the task head that it brings; ``None``: the base's.

        Raises:
            AdapterError: PEFT cannot load the directory; of one that stands apart, when it is
                first active.
        """
        config = read_config(Path(directory))
        self._invocations[name] = tuple(config.get("alora_invocation_tokens") or ())
        if stands_apart(config) or num_labels is not None or self._merged_first:
            task = Task(self.task.name, num_labels, self.task.heads)
            self._apart[name] = Path(directory), task
            return
        # PEFT's adapter names are module names, which must not have dots.
        inner = f"adapter{len(self._names)}"
        self._shared = self._attached(self._shared, directory, inner)
        self._names[name] = inner
        self._state, self._set, self._on = None, [], False

    def can_blend(self, name: str) -> bool:
        """Whether PEFT can have the adapter active beside another, or at another weight."""
        return name in self._names

    @contextlib.contextmanager
    def wide(self) -> Iterator[None]:
        """Run in float64 inside the block; the weights come back unchanged.

        Parts that the model itself computes in float32 (its norms, its softmax) stay so. Of a large
        model no copy is made.
        """
        with contextlib.ExitStack() as stack:
            self._widening, self._widened = stack, set()
            try:
                yield
            finally:
                self._widening = None

    @property
    def _dtype(self) -> Any:
        return self._torch.float32 if self._widening is None else self._torch.float64

    def _load(self, task: Task, *, stored: bool = False) -> Any:
        # Imports torch, so it waits until libraries() has said that it is there.
        from lora_edge.base.model import load_whole, loading
        from lora_edge.base.model import read_config as read_model_config

        with loading(self.base, task, None):
            config = read_model_config(self.base, task)
        if hasattr(config, "_experts_implementation"):
            # The model's own loop; the grouped operator does not exist in float64.
            config._experts_implementation = "eager"
        return load_whole(self.base, task, config=config, pooler=True, stored=stored)

    def _attached(self, model: Any, directory: str | os.PathLike[str], inner: str) -> Any:
        """The model with an adapter; its base stays as it is.

        An adapter file may hold the base's embedding and output layer, which PEFT would load over
        the rounded ones.
        """
        own: list[Any] = []
        if self._quantization is not None and not self.large:  # whose codes stand apart
            for end in (model.get_input_embeddings, model.get_output_embeddings):
                with contextlib.suppress(NotImplementedError):  # of models of images
                    own.append(getattr(end(), "weight", None))
            own = [x for x in own if x is not None]
        kept = {id(x): (x, x.detach().clone()) for x in own}
        adapted = attached(model, directory, inner)
        for parameter, values in kept.values():
            parameter.detach().copy_(values)
        return adapted

    def _rounded(self, model: Any, by_layer: ByLayer) -> None:
        """Give a model, without adapters yet, the quantized layers' values."""
        if self._quantization is None:
            return
        if self._quantization.half:
            self._halve(self._halved(model), by_layer)
            return
        plain = (self._torch.nn.Linear, self._torch.nn.Embedding)
        done: set[int] = set()
        for path in self._quantization.layers:
            module = model.get_submodule(path)
            own = module.weight.detach()
            if id(module.weight) in done:  # tied
                continue
            done.add(id(module.weight))
            transposed = not isinstance(module, plain)  # Conv1D
            matrix = own.T if transposed else own
            blocks = self._quantization.blocks(path, matrix.float().numpy())
            self._put(by_layer, module.weight, blocks, transposed=transposed)

    def _halve(self, parameters: Iterable[Any], by_layer: ByLayer) -> None:
        """Give parameters of the base what float16 has of them; vectors stay."""
        for parameter in parameters:
            if self.large:
                by_layer.halve(parameter)
            else:
                values = parameter.detach()
                values.copy_(values.to(self._torch.float16))

    def _halved(self, model: Any) -> list[Any]:
        """The parameters of a model, without adapters yet, that are to be float16."""
        kept = () if self._quantization is None else self._quantization.kept
        return [
            parameter
            for name, parameter in model.named_parameters()
            if _is_matrix(parameter) and name.rpartition(".")[0] not in kept
        ]

    def _merged_half(self, model: Any, by_layer: ByLayer, name: str) -> Any:
        """The model with an adapter merged, what comes of it in float16."""
        from lora_edge.parity.peft_layers import is_turned, merged_first  # imports torch

        directory, task = self._apart[name]
        assert self._quantization is not None
        own = self._halved(model)
        adapted = self._attached(model, directory, "only")
        built = built_layers(self.base, task)
        for parameter, change in merged_changes(built, task, name, directory).items():
            path, _, kind = parameter.rpartition(".")
            layer = built.modules.get(path)
            if kind != "weight" or layer is None or layer.kind == "norm":
                continue
            plain, values = merged_first(base_of(adapted), path, change, copied=True)
            rounded = self._torch.from_numpy(self._quantization.in_half(parameter, values))
            matrix = plain.weight.detach().T if is_turned(plain) else plain.weight.detach()
            matrix.copy_(rounded)
        self._halve(own, by_layer)
        return adapted

    def _merged(self, model: Any, by_layer: ByLayer, name: str) -> Any:
        """The model with an adapter's layers merged and rounded; what is not rounded is PEFT's."""
        from lora_edge.parity.peft_layers import is_turned, merged_first, sharing  # imports torch

        assert self._quantization is not None
        directory, task = self._apart[name]
        changes = merged_changes(built_layers(self.base, task), task, name, directory)
        for path in self._quantization.layers:
            change = changes.get(f"{path}.weight")
            others = sharing(base_of(model), path)
            layer, values = merged_first(base_of(model), path, change, copied=not self.large)
            blocks = self._quantization.blocks(path, values)
            self._put(by_layer, layer.weight, blocks, transposed=is_turned(layer))
            for other in others:  # of an encoder-decoder
                other.weight = layer.weight
        return model

    def _put(self, by_layer: ByLayer, weight: Any, blocks: Blocks, *, transposed: bool) -> None:
        """Let codes take the place of a weight's values."""
        if self.large:
            blocks = blocks._replace(codes=moved(blocks.codes))
            let_go(blocks.codes)
            by_layer.round(weight, blocks, transposed=transposed)
            return
        matrix = weight.detach().T if transposed else weight.detach()
        matrix.copy_(self._torch.from_numpy(blocks.weight()))

    @contextlib.contextmanager
    def _active(self, state: State, *, low_rank: bool = True) -> Iterator[Any]:
        """The model in which a state is active, for inference."""
        apart = [name for name, _ in state if name in self._apart]
        with contextlib.ExitStack() as stack:
            if apart:
                if len(state) > 1 or state[0][1] != 1.0:
                    raise ValueError(f"PEFT cannot blend or weight {apart[0]}")
                model, by_layer = self._apart_model(apart[0], merged=low_rank)
                if not low_rank:
                    stack.enter_context(without_low_rank(model))
            else:
                wanted = state if low_rank else BASE
                if self._names and self._state != wanted:
                    self._activate(wanted)
                model, by_layer = self._shared, self._by_layer
            if self.large:
                stack.enter_context(by_layer.computing(model, self._dtype))
            elif self._widening is not None and id(model) not in self._widened:
                self._widening.enter_context(widened(model))
                self._widened.add(id(model))
            stack.enter_context(running(state, self._names))
            # Behind what loads models: a tensor that is made inside cannot be changed outside.
            stack.enter_context(self._torch.inference_mode())
            yield model

    def _activate(self, state: State) -> None:
        """Switch the shared model to a state."""
        self._state = None
        self._unscale.close()
        tuner = self._shared.base_model
        if state:
            weights = {self._names[name]: weight for name, weight in state}
            # PEFT goes through all modules for each of these; those that were off are still set.
            if not self._on:
                tuner.enable_adapter_layers()
                self._on = True
            wanted, known = list(weights), self._set
            if known != wanted:
                self._set = []
                tuner.set_adapter(wanted)
                self._set = wanted
            self._unscale.enter_context(scaled(self._shared, weights))
        else:
            tuner.disable_adapter_layers()
            self._on = False
        self._state = state

    def _apart_model(self, name: str, *, merged: bool) -> tuple[Any, ByLayer]:
        """An adapter's own model, and how it runs by layer; ``merged`` where all are."""
        merged = merged and self._merged_first
        key = name if merged or not self._merged_first else f"{name}, not merged"
        model = self._loaded.pop(key, None)
        if model is None:
            while self._loaded and (len(self._loaded) + 1) * self._size > _KEPT:
                gone = next(iter(self._loaded))
                del self._loaded[gone]
                self._by_layer_apart.pop(gone, None)
            from lora_edge.base.mapped import Mapped
            from lora_edge.parity.by_layer import ByLayer

            directory, task = self._apart[name]
            # PEFT makes what replaces or adds to a module in the dtype that the module has.
            model = self._load(task)
            by_layer = ByLayer(Mapped(model, self.base.files), parts=False)
            self._by_layer_apart[key] = by_layer
            if merged and self._quantization is not None and self._quantization.half:
                model = self._merged_half(model, by_layer, name)
            elif merged:
                model = self._merged(self._attached(model, directory, "only"), by_layer, name)
            else:
                self._rounded(model, by_layer)
                model = self._attached(model, directory, "only")
        self._loaded[key] = model
        return model, self._by_layer_apart[key]


def _is_matrix(parameter: Any) -> bool:
    return bool(parameter.ndim > 1 and parameter.is_floating_point())
