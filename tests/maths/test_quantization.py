"""Rounding to codes: what the codes mean, and that ONNX Runtime reads them the same way."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lora_edge.maths.quantization import measured, quantize, rounded_weights


def _weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.02, 0.3, (rows, columns)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(5, 64), (7, 96), (3, 50), (6, 20)])
def test_onnx_runtime_reads_the_codes_as_they_are_meant(bits: int, shape: tuple[int, int]) -> None:
    blocks = quantize(_weight(*shape), bits)
    codes, scales, zeros = blocks.packed()
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales", "zeros"], ["y"], domain="com.microsoft",
        K=shape[1], N=shape[0], bits=bits, block_size=32,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, shape[0]])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("codes", codes), ("scales", scales), ("zeros", zeros))
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    identity = np.eye(shape[1], dtype=np.float32)
    (found,) = session.run(None, {"x": identity})
    np.testing.assert_allclose(found, blocks.weight().T, atol=1e-6)
    assert np.abs(found - _weight(*shape).T).max() > 1e-4  # which is not the weight itself


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
    quantization = measured(4, ["a", "b"], values.get, layers)
    assert quantization.layers == ("a", "b")
    assert quantization.worst_error == pytest.approx(quantization.mean_error, rel=1e-6)
    assert 0.01 < quantization.mean_error < 0.2
    assert measured(8, ["a"], values.get, layers).worst_error < quantization.mean_error / 8
    values["zero.weight"] = np.zeros((4, 32), np.float32)
    layers["zero"] = Layer(False)
    assert measured(4, ["zero"], values.get, layers).worst_error == 0
    weights = rounded_weights(values.get, quantization, layers)
    np.testing.assert_array_equal(weights("b.weight"), weights("a.weight").T)  # type: ignore[union-attr]
    assert weights("c.weight") is values["c.weight"]
    assert weights("d.weight") is None
    assert rounded_weights(values.get, None, layers) == values.get
