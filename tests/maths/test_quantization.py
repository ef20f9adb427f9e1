"""Rounding to codes: what the codes mean, and that ONNX Runtime reads them the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lora_edge.maths.quantization import Rounding, measured, quantize, rounded_weights


def _weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.02, 0.3, (rows, columns)).astype(np.float32)


HOW: list[dict[str, Any]] = [{}, {"symmetric": True}, {"algorithm": "k-quant"}]


def _run(node: onnx.NodeProto, arrays: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    kind = TensorProto.FLOAT if x.dtype == np.float32 else TensorProto.INT64
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, [None] * x.ndim)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "shape", [(5, 64, 32), (7, 96, 32), (3, 50, 32), (6, 20, 16), (4, 256, 128)]
)
def test_onnx_runtime_reads_the_codes_as_they_are_meant(
    bits: int, shape: tuple[int, int, int], how: dict[str, Any]
) -> None:
    rows, columns, size = shape
    blocks = quantize(_weight(rows, columns), bits, size, **how)
    node = helper.make_node(
        "MatMulNBits", ["x", *blocks.packed()], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=size, accuracy_level=1,
    )  # fmt: skip
    found = _run(node, blocks.packed(), np.eye(columns, dtype=np.float32))
    np.testing.assert_allclose(found, blocks.weight().T, atol=1e-6)
    assert np.abs(found - _weight(rows, columns).T).max() > 1e-4  # which is not the weight itself


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(5, 64, 32), (9, 96, 32), (6, 48, 16), (4, 256, 128)])
def test_an_embedding_reads_the_same_codes(
    bits: int, shape: tuple[int, int, int], how: dict[str, Any]
) -> None:
    rows, columns, size = shape
    blocks = quantize(_weight(rows, columns), bits, size, **how)
    arrays = {name: array.reshape(rows, -1) for name, array in blocks.packed().items()}
    names = list(arrays)
    node = helper.make_node(
        "GatherBlockQuantized", [names[0], "x", *names[1:]], ["y"], domain="com.microsoft",
        bits=bits, block_size=size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    ids = np.array([[rows - 1, 0, 2]])
    np.testing.assert_array_equal(_run(node, arrays, ids), blocks.weight()[ids])


def test_a_search_finds_nearer_codes_and_never_farther_ones() -> None:
    weight = _weight(40, 256)
    weight[3] = np.abs(weight[3]) + 1  # its zero point would lie outside of the codes
    weight[4] = 0
    plain, found = (quantize(weight, 4, algorithm=x) for x in ("rtn", "k-quant"))  # type: ignore[arg-type]
    errors = [np.square(x.weight() - weight).reshape(40, 8, 32).sum(2) for x in (plain, found)]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.99 * errors[0].sum()
    assert (found.weight()[4] == 0).all()


def test_symmetric_codes_keep_zero_and_the_largest_value() -> None:
    weight = _weight(6, 64)
    weight[1, :5] = 0
    blocks = quantize(weight, 4, symmetric=True)
    assert blocks.zeros is None
    assert "zeros" not in blocks.packed()
    assert (blocks.weight()[weight == 0] == 0).all()
    size = weight.reshape(6, 2, 32)
    places = np.abs(size).argmax(2)[..., None]
    largest = np.take_along_axis(size, places, 2)
    kept = np.take_along_axis(blocks.weight().reshape(6, 2, 32), places, 2)
    np.testing.assert_allclose(kept, largest, rtol=1e-6)


def test_rows_are_rounded_alike_whatever_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize(_weight(9, 64), 4)
    monkeypatch.setattr("lora_edge.maths.quantization._ROWS", 128)
    for name, array in quantize(_weight(9, 64), 4).packed().items():
        np.testing.assert_array_equal(array, whole.packed()[name])


@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    scale=st.floats(1e-6, 1e4),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_no_weight_moves_by_more_than_half_a_step(
    bits: int, rows: int, columns: int, scale: float, shift: float, seed: int
) -> None:
    weight = (scale * (_weight(rows, columns, seed) + shift)).astype(np.float32)
    blocks = quantize(weight, bits)
    step = np.repeat(blocks.scales, 32, axis=1)[:, :columns]
    # A zero point is rounded too, so that a range may end half a step beyond its last code.
    assert (np.abs(blocks.weight() - weight) <= 1.01 * step).all()
    inner = (blocks.codes > 0) & (blocks.codes < 2**bits - 1)
    inside = inner.reshape(rows, -1)[:, :columns]
    error = np.abs(blocks.weight() - weight)
    assert (error[inside] <= 0.51 * step[inside]).all()


def test_zero_stays_zero_and_a_block_of_zeros_too() -> None:
    weight = _weight(4, 64)
    weight[1] = 0
    weight[2, ::3] = 0
    rounded = quantize(weight, 4).weight()
    assert (rounded[weight == 0] == 0).all()
    assert np.isfinite(rounded).all()


def test_errors_are_of_the_checkpoints_layout() -> None:
    class Layer:
        def __init__(self, transposed: bool) -> None:
            self.transposed = transposed

    layers = {"a": Layer(False), "b": Layer(True)}
    values = {"a.weight": _weight(8, 64), "b.weight": _weight(8, 64).T, "c.weight": _weight(2, 3)}
    quantization = measured(Rounding(4), ["a", "b"], [], values.get, layers)
    assert quantization.layers == ("a", "b")
    assert quantization.worst_error == pytest.approx(quantization.mean_error, rel=1e-6)
    assert 0.01 < quantization.mean_error < 0.2
    assert (
        measured(Rounding(8), ["a"], [], values.get, layers).worst_error
        < quantization.mean_error / 8
    )
    values["zero.weight"] = np.zeros((4, 32), np.float32)
    layers["zero"] = Layer(False)
    assert measured(Rounding(4), ["zero"], [], values.get, layers).worst_error == 0
    weights = rounded_weights(values.get, quantization, layers)
    np.testing.assert_array_equal(weights("b.weight"), weights("a.weight").T)  # type: ignore[union-attr]
    assert weights("c.weight") is values["c.weight"]
    assert weights("d.weight") is None
    assert rounded_weights(values.get, None, layers) == values.get


def test_the_vocabulary_has_bits_of_its_own() -> None:
    class Layer:
        transposed = False

    layers = {name: Layer() for name in ("a", "head", "embedding")}
    values = {
        "a.weight": _weight(8, 64),
        "embedding.weight": _weight(9, 64),
    }  # a tied head has none
    found = measured(Rounding(4, 8), ["a"], ["head", "embedding"], values.get, layers)
    assert found.layers == ("a", "head", "embedding")
    assert found.bits_of == {"head": 8, "embedding": 8}
    rounded = rounded_weights(values.get, found, layers)
    for path, bits in (("a", 4), ("embedding", 8)):
        weight = values[f"{path}.weight"]
        np.testing.assert_array_equal(rounded(f"{path}.weight"), quantize(weight, bits).weight())  # type: ignore[arg-type]
    assert not measured(Rounding(4, 4), ["a"], ["embedding"], values.get, layers).bits_of


@pytest.mark.parametrize("how", HOW, ids=str)
def test_codes_are_the_same_however_a_weight_lies_in_memory(how: dict[str, Any]) -> None:
    """A graph may have the transpose of what PyTorch has, and sums depend on their order."""
    weight = _weight(48, 200)
    first, second = (quantize(x, 4, **how) for x in (weight, np.asfortranarray(weight)))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
