"""The first layer that differs from PyTorch is named: faults in one known layer, and none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from onnx import numpy_helper
from peft import LoraConfig, get_peft_model

from lora_edge.base.checkpoint import resolve_base
from lora_edge.bundle.bundle import Bundle, file_entries, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.exporting.export import export
from lora_edge.graph import taps
from lora_edge.parity.ask import open_reference
from lora_edge.parity.explain.localise import Divergence, localise
from lora_edge.parity.explain.repro import write_repro
from lora_edge.parity.question import sources_of
from lora_edge.parity.record.golden import Golden, recorded, shortened
from lora_edge.runtime import Runner
from lora_edge.runtime.caches import ConcatenatedCache
from lora_edge.tasks.task import Task
from tests.parity.conftest import Made
from tests.support.encoders import make_encoder
from tests.support.examples import examples
from tests.support.failing import Array, leak_rows, with_graph, with_tensor, with_weight
from tests.support.families import make_base
from tests.support.saving import load_model

FORMS = ("fused", "portable")
DOWN = "model.layers.1.mlp.down_proj"

Find = Callable[..., Divergence]


@pytest.fixture(scope="module")
def find(made: Made) -> Find:
    """Localise on one row of a bundle's golden case."""
    references: dict[tuple[str, ...], Any] = {}

    def go(bundle: Bundle | Path, case: str, row: int = 1) -> Divergence:
        runner = Runner(bundle)
        if runner.adapters not in references:
            sources = sources_of(runner.bundle, made.base, runner.adapters, {})
            references[runner.adapters] = open_reference(runner.bundle, made.base, sources)
        reference = references[runner.adapters]
        return localise(runner, reference, golden_of(runner.bundle, case), row)

    return go


def golden_of(bundle: Bundle, case: str) -> Golden:
    golden = next(golden for golden in recorded(bundle) if golden.probe.name == case)
    return shortened(golden, 4)


@pytest.mark.parametrize("form", examples(FORMS, ["fused"]))
def test_nothing_is_named_in_a_right_bundle(form: str, made: Made, find: Find) -> None:
    good = made.switchable[form]
    for golden in recorded(load_bundle(good)):
        found = find(good, golden.probe.name, len(golden.probe.rows) - 1)
        assert found.first is None, found.text
        assert not found.skipped
        assert "all 21 layers that were compared agree, and so do the outputs" in found.text
        assert found.shown == found.layers
        assert all(layer.error <= layer.limit <= 1e-4 for layer in found.layers)
        assert len({layer.floor for layer in found.layers}) > 10  # measured, one by one


@pytest.mark.parametrize("case", ["adapter rooted", "blend 0.7 narrow + 0.3 rooted"])
@pytest.mark.parametrize("form", FORMS)
def test_a_lost_low_rank_part(form: str, case: str, made: Made, find: Find, tmp_path: Path) -> None:
    bundle = with_tensor(
        made.switchable[form], tmp_path / "out", "rooted", f"lora.{DOWN}.B", np.zeros_like
    )
    found = find(bundle, case)
    assert found.first == DOWN
    assert found.text.startswith(f"the first layer that differs is {DOWN} (relative error ")
    assert not found.text.endswith(("one by one", "batch"))
    before = [layer.path for layer in found.layers].index(DOWN)
    assert before == 18  # both layers' norms and projections and the embedding
    assert all(layer.error <= layer.limit for layer in found.layers[:before])
    assert all(layer.error > 100 * layer.limit for layer in found.layers[before:])
    assert [layer.path for layer in found.shown[before:]] == [DOWN, "model.norm", "lm_head"]
    assert find(bundle, "base").first is None


def _off_by_a_thousandth(weight: Array) -> Array:
    return weight * np.float32(1.001)


def _some_nan(weight: Array) -> Array:
    weight[:, 2] = np.nan
    return weight


@pytest.mark.parametrize("fault", [_off_by_a_thousandth, _some_nan])
@pytest.mark.parametrize(
    "path",
    [
        "model.embed_tokens",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.k_proj",
        "lm_head",
    ],
)
def test_a_wrong_weight_of_the_base(
    path: str, fault: Callable[[Array], Array], made: Made, find: Find, tmp_path: Path
) -> None:
    form = FORMS[len(path) % 2]
    bundle = with_weight(made.switchable[form], tmp_path / "out", f"{path}.weight", fault)
    assert find(bundle, "base").first == path
    assert find(bundle, "adapter narrow").first == path


def test_a_norm(made: Made, find: Find, tmp_path: Path) -> None:
    parameter = "model.layers.1.post_attention_layernorm.weight"
    for form in FORMS:
        good = made.switchable[form]
        bundle = with_weight(good, tmp_path / form, parameter, _off_by_a_thousandth)
        assert find(bundle, "base").first == parameter.removesuffix(".weight")


def test_a_merged_bundle(made: Made, find: Find, tmp_path: Path) -> None:
    found = find(made.merged, "adapter rooted")
    assert found.first is None, found.text
    assert len(found.layers) == 21
    path = "model.layers.0.mlp.up_proj"
    fault = with_weight(made.merged, tmp_path / "out", f"{path}.weight", _off_by_a_thousandth)
    assert find(fault, "adapter rooted").first == path


def test_what_is_behind_the_last_layer(made: Made, find: Find, tmp_path: Path) -> None:
    def scale(model: ir.Model) -> None:
        (logits,) = [value for value in model.graph.outputs if value.name == "logits"]
        logits.name = "unscaled"
        factor = ir.tensor(np.float32(1.01), name="factor")
        value = ir.Value(name="factor", type=logits.type, shape=ir.Shape([]), const_value=factor)
        model.graph.register_initializer(value)
        node = ir.node("Mul", [logits, value], name="scale")
        node.outputs[0].name, node.outputs[0].type = "logits", logits.type
        model.graph.append(node)
        model.graph.outputs[model.graph.outputs.index(logits)] = node.outputs[0]

    found = find(with_graph(made.switchable["fused"], tmp_path / "out", scale), "adapter rooted")
    assert found.first is None
    assert found.text.startswith("all 21 layers that were compared agree and the outputs do not")
    assert found.text.endswith("the difference is behind lm_head")


def test_one_row_that_gets_what_is_another_s(
    made: Made, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row alone is right."""
    good = made.switchable["portable"]
    assert find(good, "mixed rows", 0).first is None
    leak_rows(monkeypatch)
    found = find(good, "mixed rows", 0)
    assert found.first is not None
    assert found.first.startswith("model.layers.0.self_attn.")
    assert found.text.endswith("when the row is in its batch")
    assert find(good, "adapter rooted").first is None


def test_what_is_wrong_in_decode_steps_only(
    made: Made, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = ConcatenatedCache._advance

    def shifted(self: Any, rows: Any, start: Any, every: bool) -> Any:
        later = [place + 1 if place else 0 for place in start]
        return advance(self, rows, later, every)

    good = made.switchable["portable"]
    monkeypatch.setattr(ConcatenatedCache, "_advance", shifted)
    found = find(good, "adapter rooted")
    # Positions are rotated into q and k, behind the projections.
    assert found.first == "model.layers.0.self_attn.o_proj"
    assert found.text.endswith("in tokens that are fed one by one")


def test_a_difference_that_goes_away_with_the_layers_exposed(
    made: Made, find: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = made.switchable["fused"]
    bundle = with_weight(good, tmp_path / "out", "lm_head.weight", _off_by_a_thousandth)
    tap = taps.tap
    monkeypatch.setattr(taps, "tap", lambda path: tap(good / path.relative_to(bundle.directory)))
    found = find(bundle, "base")
    assert found.first is None
    assert found.text == "the difference does not show with intermediate outputs exposed"


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="the small encoders are made with transformers 5"
)
@pytest.mark.parametrize(
    ("family", "task", "path", "other"),
    examples(
        [
            ("bert", "text-classification", "bert.encoder.layer.1.attention.self.value", "query"),
            (
                "distilbert",
                "token-classification",
                "distilbert.transformer.layer.0.ffn.lin1",
                "q_lin",
            ),
        ],
        lambda row: row[0] == "bert",
    ),
)
def test_a_bundle_without_a_cache(
    family: str, task: str, path: str, other: str, tmp_path: Path
) -> None:
    root = make_encoder(family, task, tmp_path / "base")
    torch.manual_seed(1)
    model = load_model(getattr(transformers, Task(task).loader), root)
    targets = [path.rpartition(".")[2], other]
    kind = {"text-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS"}[task]
    config = LoraConfig(r=3, target_modules=targets, task_type=kind, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "own")
    export(root, {"own": tmp_path / "own"}, output=tmp_path / "good", task=task)
    good, base = load_bundle(tmp_path / "good"), resolve_base(root)
    runner = Runner(good)
    reference = open_reference(good, base, sources_of(good, base, runner.adapters, {}))
    for golden in recorded(good):
        found = localise(runner, reference, golden, len(golden.probe.rows) - 1)
        assert found.first is None, found.text
        assert path in [layer.path for layer in found.layers]
    bundle = with_tensor(good.directory, tmp_path / "out", "own", f"lora.{path}.B", np.zeros_like)
    for case in ("adapter own", "mixed rows"):
        golden = golden_of(bundle, case)
        row = next(i for i, state in enumerate(golden.probe.states) if state)
        found = localise(Runner(bundle), reference, golden, row)
        assert found.first == path
        folder = write_repro(tmp_path / "repro", Runner(bundle), golden, found, row)
        assert folder is not None
        command = [sys.executable, str(folder / "repro.py")]
        assert subprocess.run(command, check=False).returncode == 1
        right = read_adapter(good.directory / good.adapter("own").file)[f"lora.{path}.B"]
        inputs = {**np.load(folder / "inputs.npz"), f"lora.{path}.B": right}
        np.savez(folder / "inputs.npz", **inputs)
        assert subprocess.run(command, check=False).returncode == 0


def test_what_is_not_compared_is_named_where_it_begins_there(tmp_path: Path) -> None:
    """Found: damaged experts, which are no layers of the graph, were located at the next norm."""
    base = resolve_base(make_base("mixtral", tmp_path / "base", max_position_embeddings=32))
    export(base.directory, output=tmp_path / "good")
    directory = tmp_path / "good"
    model = onnx.load(directory / "onnx" / "model.onnx")
    experts = [x for x in model.graph.initializer if "layers.0.mlp.experts" in x.name]
    assert experts
    for tensor in experts:
        array = numpy_helper.to_array(tensor) * np.float32(1.01)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, directory / "onnx" / "model.onnx")
    bundle = load_bundle(directory)
    bundle.write_manifest(replace(bundle.manifest, files=file_entries(directory)))
    runner = Runner(load_bundle(directory))
    found = localise(
        runner, open_reference(runner.bundle, base, {}), golden_of(runner.bundle, "base"), 1
    )
    assert found.first == "model.layers.1.input_layernorm"
    assert "it begins between model.layers.0.post_attention_layernorm and there" in found.text
    assert "model.layers.0.mlp.experts are not compared" in found.text
