"""What ONNX Runtime allocates for a binding is never held on to: before 1.30 it dies with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from lora_edge.runtime import Runner
from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.session import OpenGraph


class _Strict:
    """A session whose bindings give away nothing that they own."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def io_binding(self) -> _StrictBinding:
        return _StrictBinding(self._session.io_binding())

    def run_with_iobinding(self, io: _StrictBinding) -> None:
        self._session.run_with_iobinding(io.binding)


class _StrictBinding:
    def __init__(self, binding: Any) -> None:
        self.binding = binding

    def get_outputs(self) -> None:
        raise AssertionError("an output that the binding owns was kept")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.binding, name)


@pytest.mark.parametrize("form", ["fused", "portable", "foreign"])
def test_the_cache_is_bound_to_values_of_our_own(
    tiny: Any, bundles: dict[str, Any], form: str
) -> None:
    runner = Runner(bundles[form], threads=1)
    prompt, *more = tiny.rows(7, 1, 1, 3)
    expected = tiny.reference(
        form, [*prompt, *(token for row in more for token in row)], {"alpha": 1.0}
    )
    decoder = runner.decoder
    decoder.session = _Strict(decoder.session)
    decoding = decoder.start(1, 30, runner.binding("alpha", 1))
    logits = [decoding.extend_all([row])[0] for row in (prompt, *more)]
    np.testing.assert_allclose(np.concatenate(logits), expected, atol=2e-5)


def test_the_output_of_a_graph_is_a_copy(tiny: Any, bundles: dict[str, Any]) -> None:
    decoder = Runner(bundles["portable"], threads=1).decoder
    graph = decoder.graphs["decoder"]
    strict = OpenGraph(_Strict(graph.session), graph.inputs, graph.outputs)
    ids = np.array(tiny.rows(5), np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["position_ids"] = np.arange(5)[None]
    past = np.zeros((1, 2, 0, 8), np.float32)
    feeds |= dict.fromkeys(decoder.past_names, past)
    make = ort.OrtValue.ortvalue_from_numpy
    values = {name: make(array) for name, array in feeds.items()}
    found = strict.run(values, Binding(((),), decoder.tensors.off().values), "logits")
    again = found.copy()
    del values
    np.testing.assert_allclose(found[0], tiny.reference("portable", ids[0].tolist()), atol=2e-5)
    np.testing.assert_array_equal(found, again)
