"""ONNX's backend-test layout, replayed with nothing of ours."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from lora_edge.base.checkpoint import Base
from lora_edge.errors import BundleError, DataError
from lora_edge.exporting.add import add
from lora_edge.exporting.export import export
from lora_edge.parity.backend_data import write_onnx_test_data


@pytest.fixture(scope="module")
def bundles(
    exported: Path, base: Base, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    merged = tmp_path_factory.mktemp("backend") / "merged"
    export(base.directory, {"rooted": adapters["rooted"]}, "merged", merged, form="portable")
    return {"switchable": exported, "merged": merged}


def _arrays(folder: Path, kind: str, names: list[str]) -> dict[str, np.ndarray]:
    found = {}
    for index, name in enumerate(names):
        tensor = onnx.TensorProto.FromString((folder / f"{kind}_{index}.pb").read_bytes())
        assert tensor.name == name
        found[name] = numpy_helper.to_array(tensor)
    assert len(list(folder.glob(f"{kind}_*.pb"))) == len(names)
    return found


@pytest.mark.parametrize("mode", ["switchable", "merged"])
def test_it_is_replayed(mode: str, bundles: dict[str, Path], base: Base, tmp_path: Path) -> None:
    names = write_onnx_test_data(bundles[mode], tmp_path / "data", base)
    assert names == (
        ["base", "adapter narrow", "adapter rooted"] if mode == "switchable" else ["adapter rooted"]
    )
    session = ort.InferenceSession(tmp_path / "data" / "model.onnx")
    folders = sorted((tmp_path / "data").glob("test_data_set_*"))
    assert len(folders) == len(names)
    before: dict[str, np.ndarray] | None = None
    for folder in folders:
        inputs = _arrays(folder, "input", [x.name for x in session.get_inputs()])
        outputs = _arrays(folder, "output", [x.name for x in session.get_outputs()])
        got = session.run(list(outputs), inputs)
        for name, actual in zip(outputs, got, strict=True):
            np.testing.assert_allclose(actual, outputs[name], rtol=1e-3, atol=1e-4, err_msg=name)
        if before is not None:  # each set shows another adapter
            assert np.abs(outputs["logits"] - before["logits"]).max() > 0.1
        before = outputs


def test_a_fused_graph_of_the_shipped_models(tmp_path: Path) -> None:
    from tests.support import shipped

    output = tmp_path / "bundle"
    export(shipped.BASE, {"echo": shipped.ADAPTERS["echo"]}, output=output)
    text = "Word: river Answer:"
    write_onnx_test_data(output, tmp_path / "data", shipped.BASE, text=text)
    session = ort.InferenceSession(tmp_path / "data" / "model.onnx")
    folder = tmp_path / "data" / "test_data_set_1"
    inputs = _arrays(folder, "input", [x.name for x in session.get_inputs()])
    outputs = _arrays(folder, "output", [x.name for x in session.get_outputs()])
    for name, actual in zip(outputs, session.run(list(outputs), inputs), strict=True):
        np.testing.assert_allclose(actual, outputs[name], rtol=1e-3, atol=1e-4, err_msg=name)
    with pytest.raises(BundleError):
        write_onnx_test_data(output, tmp_path / "data", shipped.BASE)


def test_an_adapter_that_was_never_compared_has_no_prompts(
    bundles: dict[str, Path], base: Base, adapters: dict[str, Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(bundles["switchable"], tmp_path / "bundle"))
    add(directory, {"varied": adapters["varied"]})
    with pytest.raises(DataError, match="varied was never compared"):
        write_onnx_test_data(directory, tmp_path / "data", base)
    assert not (tmp_path / "data").exists()


def test_classifiers_have_none(tmp_path: Path) -> None:
    from tests.support import shipped

    adapter = shipped.MODELS / "classifiers" / "letters"
    export(shipped.MODELS / "tiny-bert", {"letters": adapter}, output=tmp_path / "out")
    with pytest.raises(DataError, match="text generators only"):
        write_onnx_test_data(tmp_path / "out", tmp_path / "data", shipped.MODELS / "tiny-bert")
    assert not (tmp_path / "data").exists()
