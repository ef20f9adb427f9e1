"""Laws that hold for every adapter, over random nets, shapes, ranks, patterns and kinds.

Files in PEFT's format, numpy and ONNX Runtime; neither PyTorch nor PEFT has a say here.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora_edge.adapter.load import Adapter, load_adapter
from lora_edge.bundle.adapter_files import graph_tensors
from lora_edge.bundle.part import SiteEntry
from lora_edge.fit.changes import parameter_changes, site_changes
from lora_edge.fit.check import check_modules
from lora_edge.graph import branch, find_sites, merge
from lora_edge.maths.lora import Factors, SiteChange
from lora_edge.names import InputPart
from lora_edge.runtime.adapters.active import ActiveAdapters
from lora_edge.runtime.adapters.binding import Tensors

Array = np.ndarray
Changes = dict[str, SiteChange]
EXACT = 1e-4
"""Largest error, of outputs of about 1 to 10 in float32."""
WRONG = 2e-3
"""A control must be off by more."""

_BEND: tuple[str, str, list[str], dict[str, Any]] = ("LeakyRelu", "bend", [""], {"alpha": 0.4})
"""Between two layers; it never saturates, which would hide what a control does wrong."""

law = settings(max_examples=20, derandomize=True, deadline=None, database=None)


@dataclass
class Net:
    """A small graph and its layers, parameters as a checkpoint has them.

    Attributes:
        x: its input, ``[batch, …]``.
        modules: module path -> layer.
        parameters: parameter path -> value.
        groups: of the convolutions.
    """

    x: Array
    random: np.random.Generator
    groups: int = 1
    modules: dict[str, SiteEntry] = field(default_factory=dict)
    parameters: dict[str, Array] = field(default_factory=dict)
    nodes: list[tuple[str, str, list[str], dict[str, Any]]] = field(default_factory=list)

    def draw(self, *shape: int) -> Array:
        return self.random.normal(size=shape).astype(np.float32)

    def embedding(self, path: str, vocab: int, size: int) -> None:
        self.modules[path] = SiteEntry(vocab, size, kind="embedding")
        self.parameters[f"{path}.weight"] = self.draw(vocab, size)
        self.nodes.append(("Gather", path, [f"{path}.weight", ""], {}))

    def norm(self, path: str, size: int) -> None:
        self.modules[path] = SiteEntry(size, size, kind="norm", bias=True)
        self.parameters[f"{path}.weight"] = self.draw(size)
        self.parameters[f"{path}.bias"] = self.draw(size)
        parameters = [f"{path}.weight", f"{path}.bias"]
        self.nodes.append(("LayerNormalization", path, ["", *parameters], {"axis": -1}))

    def linear(self, path: str, in_features: int, out_features: int, bias: bool) -> None:
        self.modules[path] = SiteEntry(in_features, out_features, bias=bias)
        self.parameters[f"{path}.weight"] = self.draw(out_features, in_features)
        self.nodes.append(("MatMul", path, ["", f"{path}.weight"], {}))
        if bias:
            self.parameters[f"{path}.bias"] = self.draw(out_features)
            self.nodes.append(("Add", f"{path}.add", ["", f"{path}.bias"], {}))

    def convolution(
        self, path: str, shape: Sequence[int], bias: bool, **attributes: list[int] | int
    ) -> None:
        channels = shape[1] * int(attributes.get("group", 1))  # type: ignore[arg-type]
        size = channels * int(np.prod(shape[2:]))
        self.modules[path] = SiteEntry(size, shape[0], kind="conv", bias=bias)
        self.parameters[f"{path}.weight"] = self.draw(*shape)
        inputs = ["", f"{path}.weight"]
        if bias:
            self.parameters[f"{path}.bias"] = self.draw(shape[0])
            inputs.append(f"{path}.bias")
        self.nodes.append(("Conv", path, inputs, attributes))

    def weights(self, path: str) -> Array | None:
        return self.parameters.get(path)

    def graph(self) -> ir.Model:
        initializers = {}
        for path, value in self.parameters.items():
            linear = self.modules[path.rpartition(".")[0]].kind == "linear" and value.ndim == 2
            tensor = ir.tensor(np.ascontiguousarray(value.T if linear else value), name=path)
            initializers[path] = ir.Value(
                name=path,
                shape=ir.Shape(tensor.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        kind = ir.DataType.INT64 if self.x.dtype == np.int64 else ir.DataType.FLOAT
        x = ir.Value(
            name="x", shape=ir.Shape(["batch", *self.x.shape[1:]]), type=ir.TensorType(kind)
        )
        y, nodes = x, []
        for operator, name, inputs, attributes in self.nodes:
            values = [initializers[key] if key else y for key in inputs]
            nodes.append(ir.node(operator, values, attributes, name=name))
            y = nodes[-1].outputs[0]
            y.name = f"{name}.out"
        y.shape = ir.Shape([f"y{axis}" for axis in range(self.x.ndim + (kind != 1))])
        y.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [x],
            [y],
            nodes=nodes,
            initializers=list(initializers.values()),
            opset_imports={"": 18},
            name="net",
        )
        return ir.Model(graph, ir_version=10)

    def run(self, model: ir.Model, feeds: Mapping[str, Any] | None = None) -> Array:
        """The output; feeds are OrtValues."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        proto = ir.to_proto(model).SerializeToString()
        session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        values = {"x": ort.OrtValue.ortvalue_from_numpy(self.x), **(feeds or {})}
        found: Array = session.run_with_ort_values(None, values)[0].numpy()
        return found


@st.composite
def nets(draw: st.DrawFn) -> Net:
    """Token ids, an embedding, a norm and two linear layers; or two convolutions."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    batch, bias = draw(st.integers(1, 4)), draw(st.booleans())
    sizes = st.integers(3, 8)
    if draw(st.booleans()):
        vocab, first, second, last = (draw(sizes) for _ in range(4))
        net = Net(random.integers(0, vocab, (batch, 3)), random)
        net.embedding("emb", vocab, first)
        net.norm("norm", first)
        net.linear("layers.0.lin", first, second, bias)
        net.nodes.append(_BEND)
        net.linear("layers.1.lin", second, last, not bias)
        return net
    groups = draw(st.sampled_from([1, 2]))
    share, inner, last = (draw(st.integers(2, 4)) for _ in range(3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    strides = [draw(st.integers(1, 2)) for _ in kernel]
    pads = [draw(st.integers(0, min(1, k - 1))) for k in kernel * 2]  # never padding alone
    size = [k + draw(st.integers(0, 2)) for k in kernel]
    net = Net(random.normal(size=(batch, groups * share, *size)).astype(np.float32), random, groups)
    net.convolution(
        "conv",
        [groups * inner, share, *kernel],
        bias,
        group=groups,
        strides=strides,
        pads=pads,
        kernel_shape=kernel,
    )
    net.nodes.append(_BEND)
    net.convolution("last", [last, groups * inner, *[1 for _ in kernel]], not bias)
    return net


def _rank(net: Net, path: str, units: int) -> int:
    return units * (net.groups if path == "conv" else 1)


def _load(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Adapter:
    """Through a directory, as PEFT writes it."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", **config}), encoding="utf-8"
        )
        prefixed = {f"base_model.model.{key}": value for key, value in tensors.items()}
        save_file(prefixed, folder / "adapter_model.safetensors")
        return load_adapter(folder, "adapter")


def _pair_tensors(net: Net, path: str, rank: int) -> dict[str, Array]:
    entry = net.modules[path]
    if entry.kind == "embedding":
        return {
            f"{path}.lora_embedding_A": net.draw(rank, entry.in_features),
            f"{path}.lora_embedding_B": net.draw(entry.out_features, rank),
        }
    if entry.kind == "linear":
        a, b = net.draw(rank, entry.in_features), net.draw(entry.out_features, rank)
    else:
        kernel = net.parameters[f"{path}.weight"].shape[2:]
        groups = net.groups if path == "conv" else 1
        a = net.draw(rank, entry.in_features // int(np.prod(kernel)), *kernel)
        b = net.draw(entry.out_features, rank // groups, *[1 for _ in kernel])
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def _targets(draw: st.DrawFn, net: Net) -> list[str]:
    possible = [path for path, entry in net.modules.items() if entry.kind != "norm"]
    return draw(st.lists(st.sampled_from(possible), min_size=1, unique=True))


def _plain(draw: st.DrawFn, net: Net, even: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and tensors of low-rank pairs, each with its rank and alpha by patterns."""
    targets = _targets(draw, net)
    step = 2 if even else 1
    config: dict[str, Any] = {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}}
    config["use_rslora"] = draw(st.booleans())
    tensors: dict[str, Array] = {}
    for path in targets:
        rank = _rank(net, path, step * draw(st.integers(1, 3)))
        config["rank_pattern"][path.replace(".", r"\.")] = rank
        config["alpha_pattern"][f"^{path}" if draw(st.booleans()) else path] = draw(
            st.sampled_from([0.5, 2, 3])
        )
        tensors |= _pair_tensors(net, path, rank)
    return config, tensors


@st.composite
def adapters(draw: st.DrawFn, net: Net) -> Adapter:
    """Of any kind that a net's layers take."""
    config, tensors = _plain(draw, net)
    targets = {key.rpartition(".lora_")[0] for key in tensors}
    saved = [path for path in net.modules if path not in targets and draw(st.booleans())]
    config["modules_to_save"] = saved
    for path in saved:
        for own in ("weight", "bias"):
            if f"{path}.{own}" in net.parameters:
                tensors[f"{path}.{own}"] = net.draw(*net.parameters[f"{path}.{own}"].shape)
    feature = draw(st.sampled_from(["", "use_dora", "lora_bias"]))
    if feature:
        config[feature] = True
    for path in targets:
        size, kind = net.modules[path].out_features, net.modules[path].kind
        if feature == "use_dora":
            tensors[f"{path}.lora_magnitude_vector"] = 1 + np.abs(net.draw(size))
        elif feature == "lora_bias" and kind != "embedding":
            tensors[f"{path}.lora_B.bias"] = net.draw(size)
        if net.modules[path].bias and draw(st.booleans()):
            config["bias"] = "lora_only"
            tensors[f"{path}.base_layer.bias"] = net.draw(size)
    return _load(config, tensors)


@dataclass(frozen=True)
class Switchable:
    """A net with branches for some adapters."""

    net: Net
    changes: dict[str, Changes]
    sites: dict[str, SiteEntry]
    model: ir.Model

    def __call__(self, choice: Any) -> Array:
        """A choice for all rows, or a list with one for each."""
        entry = SimpleNamespace(alone="", invocation=())
        bundle: Any = SimpleNamespace(
            manifest=SimpleNamespace(mode="switchable"), adapter=lambda _: entry
        )
        active = ActiveAdapters(bundle, Tensors(self.sites))
        for name, changes in self.changes.items():
            active.override(name, graph_tensors(changes, self.sites))
        binding = active.binding(choice, len(self.net.x))
        return self.net.run(self.model, binding.values)


def _changes(net: Net, adapter: Adapter) -> Changes:
    check_modules(adapter, net.modules, "the net")
    return site_changes(adapter, net.modules, net.weights, ())


def _switchable(net: Net, changes: dict[str, Changes]) -> Switchable:
    sites = {}
    for path, entry in net.modules.items():
        needed = {part for each in changes.values() if path in each for part in each[path].parts()}
        if needed:
            parts = tuple(part for part in get_args(InputPart) if part in needed)
            sites[path] = dataclasses.replace(entry, parts=parts)
    model = net.graph()
    branch(model, find_sites(model, sites, net.weights))
    return Switchable(net, changes, sites, model)


def _merged(net: Net, adapter: Adapter) -> Array:
    changes = parameter_changes(adapter, net.modules, ())
    owners = {path.rpartition(".")[0] for path in changes}
    model = net.graph()
    sites = find_sites(model, {path: net.modules[path] for path in owners}, net.weights)
    merge(model, sites, changes, net.weights)
    return net.run(model)


def _with_factors(changes: Changes, turn: Callable[[Factors], Factors]) -> Changes:
    return {
        path: change._replace(factors=turn(change.factors)) if change.factors else change
        for path, change in changes.items()
    }


def _error(one: Array, other: Array) -> float:
    """max |difference|, relative where the values are large."""
    return float(np.abs(one - other).max() / max(1.0, float(np.abs(other).max())))


@law
@given(net=nets(), data=st.data())
def test_a_merged_graph_is_the_switchable_one(net: Net, data: st.DataObject) -> None:
    adapter = data.draw(adapters(net))
    changes = _changes(net, adapter)
    merged = _merged(net, adapter)
    assert _error(_switchable(net, {"a": changes})("a"), merged) < EXACT
    larger = _with_factors(changes, lambda pair: Factors(pair.A, pair.B * np.float32(1.5)))
    assert _error(_switchable(net, {"a": larger})("a"), merged) > WRONG
    assert _error(_switchable(net, {"a": changes})(None), net.run(net.graph())) < EXACT


@law
@given(net=nets(), data=st.data())
def test_two_halves_blended_are_the_whole(net: Net, data: st.DataObject) -> None:
    whole = _changes(net, _load(*data.draw(st.composite(_plain)(net, even=True))))

    def half(first: bool, swapped: bool = False) -> Callable[[Factors], Factors]:
        def take(pair: Factors) -> Factors:
            middle = pair.rank // 2
            ends = [slice(0, middle), slice(middle, pair.rank)]
            a, b = ends[not first], ends[(not first) ^ swapped]
            return Factors(np.ascontiguousarray(pair.A[:, a]), pair.B[b])

        return take

    halves = {"a": _with_factors(whole, half(True)), "b": _with_factors(whole, half(False))}
    graph, expected = _switchable(net, halves), _switchable(net, {"w": whole})("w")
    assert _error(graph({"a": 1.0, "b": 1.0}), expected) < EXACT
    assert _error(graph({"a": 1.0, "b": 0.5}), expected) > WRONG
    wrong = {
        "a": _with_factors(whole, half(True, swapped=True)),
        "b": _with_factors(whole, half(False, swapped=True)),
    }
    assert _error(_switchable(net, wrong)({"a": 1.0, "b": 1.0}), expected) > WRONG


@law
@given(net=nets(), data=st.data())
def test_the_order_of_the_ranks_does_not_matter(net: Net, data: st.DataObject) -> None:
    changes = _changes(net, _load(*data.draw(st.composite(_plain)(net, even=True))))
    shift = data.draw(st.integers(1, 5))

    def turned(pair: Factors) -> Factors:
        order = np.roll(np.arange(pair.rank), shift)
        return Factors(np.ascontiguousarray(pair.A[:, order]), pair.B[order])

    def half_turned(pair: Factors) -> Factors:
        return Factors(pair.A, np.roll(pair.B, 1, axis=0))

    expected = _switchable(net, {"a": changes})("a")
    again = _switchable(net, {"a": _with_factors(changes, turned)})
    assert _error(again("a"), expected) < EXACT
    wrong = _switchable(net, {"a": _with_factors(changes, half_turned)})
    assert _error(wrong("a"), expected) > WRONG


@law
@given(net=nets(), data=st.data(), weight=st.sampled_from([-1.0, 0.25, 3.0]))
def test_a_scale_may_stand_in_alpha_in_b_or_in_the_gate(
    net: Net, data: st.DataObject, weight: float
) -> None:
    config, tensors = data.draw(st.composite(_plain)(net))
    graph = _switchable(net, {"a": _changes(net, _load(config, tensors))})
    by_gate = graph({"a": weight})
    scaled = {
        key: value * np.float32(weight) if key.endswith(("B.weight", "embedding_B")) else value
        for key, value in tensors.items()
    }
    by_b = _load(config, scaled)
    alphas = {key: weight * alpha for key, alpha in config["alpha_pattern"].items()}
    by_alpha = _load({**config, "alpha_pattern": alphas}, tensors)
    for adapter in (by_b, by_alpha):
        assert _error(_merged(net, adapter), by_gate) < EXACT
    assert _error(_merged(net, _load({**config, "alpha_pattern": alphas}, scaled)), by_gate) > WRONG


@law
@given(net=nets(), data=st.data())
def test_rslora_is_an_alpha_that_grows_with_the_root_of_the_rank(
    net: Net, data: st.DataObject
) -> None:
    config, tensors = data.draw(st.composite(_plain)(net, even=True))
    rooted = _merged(net, _load({**config, "use_rslora": True}, tensors))
    ranks = config["rank_pattern"].values()
    alphas = {
        key: alpha * np.sqrt(rank)
        for (key, alpha), rank in zip(config["alpha_pattern"].items(), ranks, strict=True)
    }
    plain = {**config, "use_rslora": False}
    assert _error(_merged(net, _load({**plain, "alpha_pattern": alphas}, tensors)), rooted) < EXACT
    assert _error(_merged(net, _load(plain, tensors)), rooted) > WRONG


@law
@given(net=nets(), data=st.data())
def test_each_row_of_a_mixed_batch_is_that_row_alone(net: Net, data: st.DataObject) -> None:
    changes = {name: _changes(net, data.draw(adapters(net))) for name in ("a", "b")}
    graph = _switchable(net, changes)
    batch = len(net.x)
    rows = data.draw(st.lists(st.sampled_from(["a", "b", None]), min_size=batch, max_size=batch))
    mixed = graph(rows)
    alone = {state: graph(state) for state in ("a", "b", None)}
    for index, state in enumerate(rows):
        assert _error(mixed[index], alone[state][index]) < EXACT
        for other in {"a", "b", None} - {state}:
            assert _error(mixed[index], alone[other][index]) > WRONG


@law
@given(net=nets(), data=st.data())
def test_the_order_of_a_concatenation_does_not_matter(net: Net, data: st.DataObject) -> None:
    first, second = (_changes(net, _load(*data.draw(st.composite(_plain)(net)))) for _ in range(2))
    weights = data.draw(st.sampled_from([(1.0, 0.5), (-0.5, 2.0)]))
    one = _switchable(net, {"a": first, "b": second})
    other = _switchable(net, {"a": second, "b": first})
    blended = one({"a": weights[0], "b": weights[1]})
    assert _error(other({"b": weights[0], "a": weights[1]}), blended) < EXACT
    assert _error(other({"a": weights[0], "b": weights[1]}), blended) > WRONG
    rows: list[Any] = [{"a": weights[0], "b": weights[1]}, "a", None, "b"][: len(net.x)]
    names: dict[Any, Any] = {"a": "b", "b": "a", None: None}
    turned = [
        {names[key]: value for key, value in row.items()} if isinstance(row, dict) else names[row]
        for row in rows
    ]
    assert _error(other(turned), one(rows)) < EXACT
