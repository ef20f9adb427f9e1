"""Layers of few bits in one node: the same bits, fewer nodes, each layer still found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from lora_edge.bundle.part import SiteEntry
from lora_edge.graph import branch, check, find_sites, load, pack, save_with_data, unsplit_attention
from lora_edge.graph.merge import add_initializer
from lora_edge.maths.quantization import quantize

_IN, _BATCH, _HEAD = 64, 1, 16
_OUT = {"q": 64, "k": 32, "v": 32, "other": 48}


def _model(*, biased: bool = False, bits: dict[str, int] | None = None) -> ir.Model:
    """An attention whose q, k and v read x, and a layer that reads what it gives."""
    bias = {
        "q": "[bias] qb = Add (q, qbias)" if biased else "",
        "query": "qb" if biased else "q",
        "values": f", float[{_OUT['q']}] qbias = {{{', '.join(['0.5'] * _OUT['q'])}}}"
        if biased
        else "",
    }
    text = f"""
    <ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
    g (float[b, s, {_IN}] x, float[b, 2, p, {_HEAD}] pk, float[b, 2, p, {_HEAD}] pv,
       int32[b] lengths, int32 total) => (float[b, s, {_OUT["other"]}] other)
    <float[1] unused = {{0}}{bias["values"]}>
    {{
        [q] q = Identity (x)
        {bias["q"]}
        [k] k = Identity (x)
        [v] v = Identity (x)
        [att] a, nk, nv = com.microsoft.GroupQueryAttention
            <num_heads = 4, kv_num_heads = 2> ({bias["query"]}, k, v, pk, pv, lengths, total)
        [other] other = Identity (a)
    }}
    """
    model = ir.from_onnx_text(text)
    generator = np.random.default_rng(0)
    for node in list(model.graph):
        name = str(node.name)
        if name not in _OUT:
            continue
        weight = generator.standard_normal((_OUT[name], _IN), np.float32)
        blocks = quantize(weight, (bits or {}).get(name, 4), 32)
        inputs = [node.inputs[0]]
        for part, array in blocks.packed().items():
            inputs.append(add_initializer(model, f"{name}.weight.{part}", array))
        attributes = {
            "K": _IN, "N": _OUT[name], "bits": blocks.bits, "block_size": 32, "accuracy_level": 4,
        }  # fmt: skip
        made = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=name)
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        made.outputs[0].shape = ir.Shape(["b", "s", _OUT[name]])
        model.graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(
            node.outputs[0], made.outputs[0], replace_graph_outputs=True
        )
        called = node.outputs[0].name
        model.graph.remove(node, safe=True)
        made.outputs[0].name = called
    return model


def _run(model: ir.Model, folder: Path, **more: np.ndarray) -> np.ndarray:
    folder.mkdir()
    save_with_data(model, folder / "m.onnx")
    check(folder / "m.onnx")
    session = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(1)
    past = generator.standard_normal((2, _BATCH, 2, 8, _HEAD), np.float32)
    feeds = {
        "x": generator.standard_normal((_BATCH, 3, _IN), np.float32),
        "pk": past[0],
        "pv": past[1],
        "lengths": np.array([7], np.int32),
        "total": np.array(8, np.int32),
        **more,
    }
    (out,) = session.run(None, {x.name: feeds[x.name] for x in session.get_inputs()})
    return np.asarray(out)


def _operators(model: ir.Model, name: str) -> int:
    return sum(node.op_type == name for node in model.graph)


@pytest.mark.parametrize("biased", [False, True])
def test_packed_layers_give_the_same_bits(biased: bool, tmp_path: Path) -> None:
    plain, packed, whole = (_model(biased=biased) for _ in range(3))
    pack(packed)
    assert (_operators(packed, "MatMulNBits"), _operators(packed, "Split")) == (2, 1)
    pack(whole)
    unsplit_attention(whole)
    # A bias stands between the packed node and the attention.
    assert _operators(whole, "Split") == int(biased)
    expected = _run(plain, tmp_path / "plain")
    # A bias of a layer alone is added within its node by ONNX Runtime, in another order.
    tolerance = 1e-5 if biased else 0
    for name, model in (("packed", packed), ("whole", whole)):
        np.testing.assert_allclose(_run(model, tmp_path / name), expected, rtol=tolerance)


def test_layers_of_other_bits_stay_apart() -> None:
    model = _model(bits={"q": 8})
    pack(model)
    names = {node.name for node in model.graph if node.op_type == "MatMulNBits"}
    assert names == {"q", "k+v", "other"}


def test_a_layer_that_shares_its_codes_stays_apart() -> None:
    model = _model()
    codes = model.graph.initializers["k.weight.codes"]
    (v,) = [node for node in model.graph if node.name == "v"]
    v.replace_input_with(1, codes)
    pack(model)
    assert _operators(model, "Split") == 0


def test_branches_of_packed_layers(tmp_path: Path) -> None:
    """Branches are found by layer, also after the graph was written and read again."""
    layers = {
        name: SiteEntry(kind="linear", in_features=_IN, out_features=_OUT[name], parts=("A", "B"))
        for name in ("q", "v")
    }
    found = []
    for name in ("plain", "packed"):
        model = _model()
        if name == "packed":
            pack(model)
        (tmp_path / name).mkdir()
        save_with_data(model, tmp_path / name / "m.onnx")
        model = load(tmp_path / name / "m.onnx")
        sites = find_sites(model, layers)
        assert [site.y.name for site in sites.values()] == ["q", "v"]
        branch(model, sites)
        generator = np.random.default_rng(2)
        feeds = {
            f"lora.{path}.{part}": generator.standard_normal(shape, np.float32)
            for path in layers
            for part, shape in (("A", (_IN, 4)), ("B", (4, _OUT[path])), ("gate", (1, 1, 4)))
        }
        found.append(_run(model, tmp_path / f"{name}-run", **feeds))
    np.testing.assert_array_equal(*found)


def test_layers_of_several_modules_that_read_an_input_stay_apart() -> None:
    """What an encoder gives is read by all layers of a decoder."""
    model = _model()
    for node in model.graph:
        if node.name in ("q", "k", "v"):
            node.name = f"{'one' if node.name == 'q' else 'two'}.{node.name}"
    pack(model)
    named = {str(node.name) for node in model.graph if node.op_type == "MatMulNBits"}
    assert named == {"one.q", "two.k+two.v", "other"}
