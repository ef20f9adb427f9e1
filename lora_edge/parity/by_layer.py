"""A model of which there is no copy: its weights stay as the checkpoint has them, in its file.

A layer's weights have the dtype that is computed in while the layer runs; afterwards the memory is
given back. The embedding and the head, which are no layers, are read in parts. So a model of any
dtype runs in float32 or float64, with the same values as a model that was cast as a whole.
One of the few files of this package that import torch, transformers or peft.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.base.mapped import Mapped
from lora_edge.files.pages import trim
from lora_edge.files.spilled import let_go, spilled
from lora_edge.maths.quantization import Blocks

WHOLE = 50_000_000
"""Parameters of a model that may be in memory as a whole, and twice in another dtype."""

_LARGE = 1 << 20  # numbers of a weight outside of the layers that is read in parts
_PART = 1 << 21  # numbers of a part


class ByLayer:
    """Runs a model in a dtype that its weights need not have, a layer at a time.

    Knows the model's modules as they are when a block begins: PEFT may have wrapped some. Nothing
    but a block of :meth:`computing` may change a weight of the base.
    """

    def __init__(self, mapped: Mapped, *, parts: bool = True) -> None:
        """Nothing is changed yet.

        Args:
            mapped: what of the model is mapped.
            parts: read the embedding and the head in parts; ``False`` where an adapter's modules
                read their weights by themselves.
        """
        self._mapped = mapped
        self._parts = parts
        self._codes: dict[int, tuple[Blocks, bool]] = {}
        self._hooks: _Hooks | None = None
        self._halves: set[int] = set()

    def round(self, weight: nn.Parameter, blocks: Blocks, *, transposed: bool) -> None:
        """Compute with rounded values in a weight's place from now on; the weight is given back.

        Args:
            weight: the base's parameter.
            blocks: its values, ``[out, in]``.
            transposed: the parameter is ``[in, out]``.
        """
        self._codes[id(weight)] = blocks, transposed
        self._mapped.give_back(weight)

    def halve(self, weight: nn.Parameter) -> None:
        """Compute with what float16 has of a weight of the base's from now on."""
        self._halves.add(id(weight))

    @contextlib.contextmanager
    def computing(self, model: Any, dtype: torch.dtype) -> Iterator[None]:
        """Run the model in a dtype, inside the block; afterwards it is as it was before.

        What the model itself computes in float32 (its norms, its softmax) stays so.
        """
        if self._hooks is None or not self._hooks.are_of(model):
            if self._hooks is not None:
                self._hooks.remove()
            self._hooks = _Hooks(model, parts=self._parts)
        hooks, run = self._hooks, _Run(self._codes, self._halves, self._mapped, dtype)
        with contextlib.ExitStack() as stack:
            stack.callback(run.close)
            stack.enter_context(hooks.calling(run))
            for module, own in hooks.held:
                run.hold(module, own)
            for module in hooks.heads:
                stack.enter_context(run.head(module))
            yield


class _Hooks:
    """What a model's modules call before and after they run; nothing between two blocks.

    They stay from block to block, because a large model has tens of thousands of them, and are made
    anew for a model whose modules are others by then. They know no module, which would never go.

    Attributes:
        held: modules outside of the layers whose tensors are held for a block, and those.
        heads: modules whose outputs are computed in parts.
    """

    def __init__(self, model: Any, *, parts: bool) -> None:
        self._modules = _shape(model)
        self._called = _Called()
        self._handles: list[Any] = []
        self.held: list[tuple[Any, list[Tensor]]] = []
        self.heads: list[Any] = []
        inside: set[int] = set()
        for layer in dict.fromkeys(_layers(model)):
            owned = {module: _own(module) for module in layer.modules()}
            whole = [tensor for own in owned.values() for tensor in own]
            inside |= {id(tensor) for tensor in whole}
            self._layer(layer, whole, frozenset(map(id, owned)))
            # A model may run a part of a layer alone.
            for module, own in owned.items():
                if module is not layer and own:
                    self._part(module, own)
        for name, module in model.named_modules():
            own = _own(module)
            if all(id(tensor) in inside for tensor in own):
                continue
            if not parts or "lora_" in name:
                self.held.append((module, own))
            elif _is_table(module):
                self._table(module)
            elif _is_head(module):
                self.heads.append(module)
            else:
                self.held.append((module, own))

    def are_of(self, model: Any) -> bool:
        """Whether the model has the modules that it had."""
        return self._modules == _shape(model)

    def remove(self) -> None:
        """Take them from the modules."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def calling(self, run: _Run) -> Iterator[None]:
        """Have them call a block's run."""
        self._called.run = run
        try:
            yield
        finally:
            self._called.run = None

    def _layer(self, layer: Any, tensors: Sequence[Tensor], modules: frozenset[int]) -> None:
        called = self._called

        def before(module: Any, *_: Any) -> None:
            if called.run is not None:
                called.run.enter(module, tensors, modules)

        def after(module: Any, *_: Any) -> None:
            if called.run is not None:
                called.run.leave(module)

        self._around(layer, before, after)

    def _part(self, module: Any, tensors: Sequence[Tensor]) -> None:
        called = self._called

        def before(own: Any, *_: Any) -> None:
            if called.run is not None:
                called.run.hold_alone(own, tensors)

        def after(own: Any, *_: Any) -> None:
            if called.run is not None:
                called.run.restore(own)

        self._around(module, before, after)

    def _table(self, module: Any) -> None:
        called = self._called

        def before(own: Any, args: Any, kwargs: Any) -> Any:
            return None if called.run is None else called.run.rows(own, args, kwargs)

        def after(own: Any, *_: Any) -> None:
            if called.run is not None:
                called.run.restore(own)

        self._around(module, before, after, with_kwargs=True)

    def _around(
        self,
        module: Any,
        before: Callable[..., Any],
        after: Callable[..., Any],
        *,
        with_kwargs: bool = False,
    ) -> None:
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=with_kwargs))
        self._handles.append(module.register_forward_hook(after, always_call=True))


class _Called:
    """Whom hooks call; ``None``: nobody."""

    run: _Run | None = None


class _Run:
    """One block of :meth:`ByLayer.computing`."""

    def __init__(
        self,
        codes: Mapping[int, tuple[Blocks, bool]],
        halves: Set[int],
        mapped: Mapped,
        dtype: torch.dtype,
    ) -> None:
        self._codes, self._halves, self._mapped, self._dtype = codes, halves, mapped, dtype
        self._held: dict[int, list[tuple[Tensor, Tensor]]] = {}  # module -> tensor, its own data
        self._ids: set[int] = set()  # of the tensors that are held
        self._running: frozenset[int] = frozenset()  # modules of the layer that is held
        self._before: dict[int, list[frozenset[int]]] = {}  # layer -> what ran before it

    def close(self) -> None:
        for held in list(self._held):
            self._restore(held)
        if self._dtype == torch.float64:  # whose blocks are of no use to what is float32
            trim()

    def enter(self, layer: Any, tensors: Sequence[Tensor], modules: frozenset[int]) -> None:
        """Hold all that a layer has while it runs.

        Args:
            layer: the module.
            tensors: its parameters and buffers.
            modules: ids of the layer and all modules in it.
        """
        self.hold(layer, tensors)
        self._before.setdefault(id(layer), []).append(self._running)
        self._running |= modules

    def leave(self, layer: Any) -> None:
        """A layer has run, or failed."""
        before = self._before.get(id(layer))
        if before:  # else it has failed before it held anything
            self._running = before.pop()
        self._restore(id(layer))

    def hold_alone(self, module: Any, tensors: Sequence[Tensor]) -> None:
        """Hold what a module in a layer has beside the modules in it, where it runs alone."""
        if id(module) not in self._running:
            self.hold(module, tensors)

    def restore(self, module: Any) -> None:
        """Restore what a module holds, where it holds something."""
        if id(module) in self._held:
            self._restore(id(module))

    def hold(self, module: Any, tensors: Iterable[Tensor]) -> None:
        """Give tensors the dtype until the module has run; of those that others hold, none."""
        held = self._held.setdefault(id(module), [])
        with _changing():
            for tensor in tensors:
                if tensor.is_floating_point() and id(tensor) not in self._ids:
                    self._put(held, tensor, self._values(tensor))

    def rows(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Of a table, those rows that are looked up, in the dtype, in the table's place."""
        ids = args[0] if args else kwargs["input"]
        chosen, places = torch.unique(ids, return_inverse=True)
        held, weight = self._held.setdefault(id(module), []), module.weight
        with _changing():
            self._put(held, weight, self._some(weight, chosen))
        return ((places, *args[1:]), kwargs) if args else (args, {**kwargs, "input": places})

    @contextlib.contextmanager
    def head(self, module: Any) -> Iterator[None]:
        """A linear layer that computes some of its outputs at a time."""

        def forward(x: Tensor) -> Tensor:
            weight = module.weight
            bias = None if module.bias is None else module.bias.detach().to(self._dtype)
            count = max(1, _PART // weight.shape[1])
            values = spilled((*x.shape[:-1], len(weight)), str(x.dtype).removeprefix("torch."))
            y = torch.from_numpy(values)
            for start in range(0, len(weight), count):
                some = slice(start, start + count)
                part = nn.functional.linear(x, self._some(weight, some))
                y[..., some] = part if bias is None else part + bias[some]
                let_go(values)
                self._mapped.give_back(weight)
            return y

        had = vars(module).get("forward")
        module.forward = forward
        try:
            yield
        finally:
            if had is None:
                del module.forward
            else:
                module.forward = had

    def _values(self, tensor: Tensor) -> Tensor:
        """A tensor's values in the dtype; itself where it has it."""
        if id(tensor) not in self._codes:
            return self._plain(tensor, tensor.detach())
        blocks, transposed = self._codes[id(tensor)]
        matrix = decoded(blocks)
        let_go(blocks.codes)
        return (matrix.T if transposed else matrix).to(self._dtype)

    def _some(self, tensor: Tensor, rows: Tensor | slice) -> Tensor:
        """Some rows of a tensor ``[rows, columns]``, in the dtype."""
        if id(tensor) not in self._codes:
            return self._plain(tensor, tensor.detach()[rows])
        blocks, transposed = self._codes[id(tensor)]
        assert not transposed  # a table and a head are [out, in]
        some = decoded(blocks.rows(rows.numpy() if isinstance(rows, Tensor) else rows))
        let_go(blocks.codes)
        return some.to(self._dtype)

    def _plain(self, tensor: Tensor, values: Tensor) -> Tensor:
        """Values of a tensor that are no codes, in the dtype."""
        if id(tensor) in self._halves:
            values = values.to(torch.float16)
        return values.to(self._dtype)

    def _put(self, held: list[tuple[Tensor, Tensor]], tensor: Tensor, values: Tensor) -> None:
        held.append((tensor, tensor.data))
        self._ids.add(id(tensor))
        tensor.data = values

    def _restore(self, owner: int) -> None:
        with _changing():
            for tensor, own in reversed(self._held.pop(owner, [])):
                tensor.data = own
                self._ids.discard(id(tensor))
                self._mapped.give_back(tensor)


@contextlib.contextmanager
def _changing() -> Iterator[None]:
    """Tensors that are made in the block may take the place of a model's."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def decoded(blocks: Blocks) -> Tensor:
    """The weight that codes mean, ``[out, in]`` float32, as :meth:`Blocks.weight` has it."""
    steps = torch.from_numpy(blocks.codes).to(torch.float32)
    if blocks.zeros is None:
        steps -= 2 ** (blocks.bits - 1)
    else:
        steps -= torch.from_numpy(blocks.zeros)[..., None]
    steps *= torch.from_numpy(blocks.scales)[..., None]
    return steps.view(len(steps), -1)[:, : blocks.in_features]


def _layers(module: Any) -> Iterator[Any]:
    """The items of the outermost lists of modules."""
    for child in module.children():
        listed = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        yield from [child] if listed else _layers(child)


def _is_table(module: Any) -> bool:
    """A large embedding that looks rows up, and may scale them."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    plain = type(module).forward is nn.Embedding.forward
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    return (plain or scaled) and module.weight.numel() >= _LARGE


def _is_head(module: Any) -> bool:
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and module.weight.numel() >= _LARGE


def _shape(model: Any) -> list[tuple[int, int]]:
    """Its modules, and how many parameters each has of its own."""
    return [(id(module), len(module._parameters)) for module in model.modules()]


def _own(module: Any) -> list[Tensor]:
    """The parameters and buffers of a module, without those of the modules in it."""
    own = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in own if tensor is not None]
