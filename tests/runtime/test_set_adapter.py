"""set_adapter on what a library keeps: a session in a model, without the library."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from lora_edge import set_adapter
from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import AdapterNotFoundError, BundleError, DataError, OptionError
from lora_edge.runtime import Runner
from lora_edge.runtime.adapted_session import AdaptedSession

IDS = [[5, 9, 13, 7]]


class Model:
    """What optimum's models have of a session, and how they call it."""

    def __init__(self, path: Path) -> None:
        self.session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.input_names = {x.name: i for i, x in enumerate(self.session.get_inputs())}
        self.use_io_binding = True
        self.config = SimpleNamespace()

    def logits(self, ids: list[list[int]] = IDS, mask: Any = None, past: int = 0) -> Any:
        array = np.array(ids)
        total = array.shape[1] + past
        given: dict[str, Any] = {
            "input_ids": array,
            "attention_mask": np.ones((len(ids), total), np.int64) if mask is None else mask,
            "position_ids": np.tile(np.arange(past, total), (len(ids), 1)),
        }
        inputs = {x.name: x for x in self.session.get_inputs()}
        for name, node in inputs.items():
            if name.startswith("past_key_values."):
                shape = (len(ids), node.shape[1], past, node.shape[3])
                given[name] = np.zeros(shape, np.float32)
        feeds = {name: given[name] for name in self.input_names if name in given}
        return self.session.run(["logits"], feeds)[0]


@pytest.fixture(params=["fused", "portable"])
def opened(request: pytest.FixtureRequest, bundles: dict[str, Bundle]) -> Bundle:
    return bundles[request.param]


def test_adapters_and_blends(opened: Bundle) -> None:
    model, runner = Model(opened.path("onnx/model.onnx")), Runner(opened)
    with pytest.raises(ValueError, match=r"lora\..* missing"):
        model.logits()
    seen = []
    for choice in ("alpha", None, {"alpha": 0.5, "beta": 0.25}, "none", "alpha"):
        set_adapter(model, choice)
        found = model.logits()
        np.testing.assert_allclose(found, runner.logits(IDS, adapter=choice), atol=1e-6)
        seen.append(found)
    np.testing.assert_array_equal(seen[0], seen[-1])
    np.testing.assert_array_equal(seen[1], seen[3])
    for other in seen[1:3]:
        assert np.abs(seen[0] - other).max() > 1e-3
    assert not model.use_io_binding
    assert "input_ids" in model.input_names
    assert not [x for x in model.input_names if x.startswith(("lora.", "num_logits"))]
    assert [x.name for x in model.session.get_inputs()] == list(model.input_names)
    assert isinstance(model.session, AdaptedSession)
    assert model.session.get_providers() == ["CPUExecutionProvider"]


def test_a_refusal_changes_nothing(opened: Bundle) -> None:
    model = Model(opened.path("onnx/model.onnx"))
    with pytest.raises(AdapterNotFoundError, match="no adapter 'nope'"):
        set_adapter(model, "nope")
    assert isinstance(model.session, ort.InferenceSession)
    assert model.use_io_binding
    set_adapter(SimpleNamespace(model=model), "alpha")  # as a pipeline has it
    before = model.logits()
    with pytest.raises(DataError, match="finite in float32"):
        set_adapter(model, {"beta": float("nan")})
    np.testing.assert_array_equal(model.logits(), before)
    for run in (model.session.run_with_iobinding, model.session.run_with_ort_values):
        with pytest.raises(DataError, match="would not have it"):
            run(None, {})


def test_rows_of_a_fused_graph(bundles: dict[str, Bundle]) -> None:
    rows = [[5, 9, 13], [7, 7, 8]]
    left = np.array([[1, 1, 1], [0, 1, 1]])
    fused, portable = (Model(bundles[x].path("onnx/model.onnx")) for x in ("fused", "portable"))
    for model in (fused, portable):
        set_adapter(model, "alpha")
    with pytest.raises(DataError, match="padded on the left"):
        fused.logits(rows, left)
    portable.logits(rows, left)
    fused.logits(rows, left[:, ::-1])
    with pytest.raises(DataError, match="2 rows of 3 new tokens stand behind a past"):
        fused.logits(rows, past=2)
    fused.logits(rows[:1], past=2)


def test_what_is_no_model_of_a_bundle(opened: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="model is a int, expected one with a session"):
        set_adapter(3)
    alone = tmp_path / "model.onnx"
    alone.write_bytes(opened.path("onnx/model.onnx").read_bytes())
    with pytest.raises(OptionError, match=r"model\.onnx, which is in no bundle"):
        set_adapter(Model(alone), "alpha")
    other = bundle.directory / "onnx" / "other.onnx"
    other.write_bytes(bundle.path("onnx/model.onnx").read_bytes())
    with pytest.raises(OptionError, match=r"other\.onnx, which is not the graph") as caught:
        set_adapter(Model(other), "alpha")
    assert "onnx/model.onnx" in caught.value.hint
    model = Model(bundle.path("onnx/model.onnx"))
    with bundle.path("adapters/alpha/adapter.onnx_adapter").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(BundleError, match="differs from its hash"):
        set_adapter(model, "alpha")


def test_a_copy_is_no_circle(opened: Bundle) -> None:
    model = Model(opened.path("onnx/model.onnx"))
    set_adapter(model, "alpha")
    copied = copy.copy(model.session)
    assert copied.session is model.session.session
    with pytest.raises(AttributeError):
        _ = AdaptedSession.__new__(AdaptedSession).get_providers
