"""A model of which there is no copy: its weights stay as the checkpoint has them, in its file.

A layer's weights have the dtype that is computed in while the layer runs; afterwards the memory is
given back. The embedding and the head, which are no layers, are read in parts. So a model of any
dtype runs in float32 or float64, with the same values as a model that was cast as a whole.
One of the few files of this package that import torch, transformers or peft.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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

    def round(self, weight: nn.Parameter, blocks: Blocks, *, transposed: bool) -> None:
        """Compute with rounded values in a weight's place from now on.

        Args:
            weight: the base's parameter.
            blocks: its values, ``[out, in]``.
            transposed: the parameter is ``[in, out]``.
        """
        self._codes[id(weight)] = blocks, transposed

    @contextlib.contextmanager
    def computing(self, model: Any, dtype: torch.dtype) -> Iterator[None]:
        """Run the model in a dtype, inside the block; afterwards it is as it was before.

        What the model itself computes in float32 (its norms, its softmax) stays so.
        """
        layers = dict.fromkeys(_layers(model))
        inside = {id(value) for layer in layers for value in _all(layer)}
        run = _Run(self._codes, self._mapped, dtype)
        with contextlib.ExitStack() as stack:
            stack.callback(run.close)
            for layer in layers:
                stack.enter_context(run.around(layer, run.whole))
                # A model may run a part of a layer alone.
                for module in layer.modules():
                    if module is not layer and next(_own(module), None) is not None:
                        stack.enter_context(run.around(module, run.own))
            for name, module in model.named_modules():
                if all(id(value) in inside for value in _own(module)):
                    continue
                if not self._parts or "lora_" in name:
                    run.hold(module, _own(module))
                elif _is_table(module):
                    stack.enter_context(run.around(module, run.rows))
                elif _is_head(module):
                    stack.enter_context(run.head(module))
                else:
                    run.hold(module, _own(module))
            yield


class _Run:
    """One block of :meth:`ByLayer.computing`."""

    def __init__(
        self, codes: Mapping[int, tuple[Blocks, bool]], mapped: Mapped, dtype: torch.dtype
    ) -> None:
        self._codes, self._mapped, self._dtype = codes, mapped, dtype
        self._held: dict[int, list[tuple[Tensor, Tensor]]] = {}  # module -> tensor, its own data
        self._ids: set[int] = set()  # of the tensors that are held

    def close(self) -> None:
        for held in list(self._held):
            self._restore(held)
        trim()

    @contextlib.contextmanager
    def around(self, module: Any, before: Callable[..., Any]) -> Iterator[None]:
        """Call a hook before a module runs, and restore what it holds afterwards."""
        hooks = (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def whole(self, module: Any, *_: Any) -> None:
        """Hold all that a module has."""
        self.hold(module, _all(module))

    def own(self, module: Any, *_: Any) -> None:
        """Hold what a module has beside the modules inside it."""
        self.hold(module, _own(module))

    def _after(self, module: Any, *_: Any) -> None:
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
            return tensor.detach().to(self._dtype)
        blocks, transposed = self._codes[id(tensor)]
        matrix = decoded(blocks)
        return (matrix.T if transposed else matrix).to(self._dtype)

    def _some(self, tensor: Tensor, rows: Tensor | slice) -> Tensor:
        """Some rows of a tensor ``[rows, columns]``, in the dtype."""
        if id(tensor) not in self._codes:
            return tensor.detach()[rows].to(self._dtype)
        blocks, transposed = self._codes[id(tensor)]
        assert not transposed  # a table and a head are [out, in]
        return decoded(blocks.rows(rows.numpy() if isinstance(rows, Tensor) else rows)).to(
            self._dtype
        )

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


def _all(module: Any) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _own(module: Any) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
