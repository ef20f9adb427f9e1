"""Mixture-of-experts decoders: right against PyTorch, or refused by name; what the graph holds."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from lora_edge.base.checkpoint import resolve_base
from lora_edge.capture import capture
from lora_edge.errors import CaptureError, UnsupportedModelError
from lora_edge.tasks.task import Task
from tests.support.captures import captured
from tests.support.checks import checked
from tests.support.examples import examples
from tests.support.families import MOE, make_base

Form = Literal["fused", "portable"]
# One of each way to choose experts and to add them up.
_ROUTERS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "phimoe", "minimax_m2", "glm4_moe",
    "ernie4_5_moe",
)  # fmt: skip
_FIVE = int(transformers.__version__.split(".")[0]) >= 5
_stacked = pytest.mark.skipif(not _FIVE, reason="transformers 4 has no stacked experts")


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found: list[onnx.NodeProto] = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _nodes(attribute.g)
    return found


@_stacked
@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
@pytest.mark.parametrize("family", examples(MOE, _ROUTERS))
def test_family_equals_pytorch(family: str, form: Form, tmp_path: Path) -> None:
    base = make_base(family, tmp_path / "base")
    graph = captured(base, form, tmp_path / form)
    figures = checked(graph, resolve_base(base))
    assert max(case["logit_error"] for case in figures["cases"].values()) <= 1e-5
    assert figures["window_covered"]
    assert "decode, one row" in figures["cases"]


@_stacked
@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "phimoe", "glm4_moe"])
def test_experts_are_the_checkpoints_own_tensors(family: str, form: Form, tmp_path: Path) -> None:
    base = make_base(family, tmp_path / "base")
    graph = captured(base, form, tmp_path / "out")
    model = onnx.load(graph.path())
    tensors = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    reference = AutoModelForCausalLM.from_pretrained(base)
    state = reference.state_dict()
    listed = 0
    for path, module in graph.parameter_modules.items():
        owner = reference.get_submodule(path)
        names = [name for name, x in owner.named_parameters(recurse=False) if x.ndim > 1]
        assert list(module.parameters) == names  # PEFT wraps them in this order
        assert module.transposed is bool(getattr(owner, "is_transposed", False))
        for name, shape in module.parameters.items():
            listed += len(shape) == 3
            assert tensors[f"{path}.{name}"].shape == shape
            np.testing.assert_array_equal(tensors[f"{path}.{name}"], state[f"{path}.{name}"])
    assert listed == sum(x.ndim == 3 for x in state.values()) > 0
    # Nothing is there twice, and the graph file itself holds no weights.
    assert sum(x.size for x in tensors.values() if x.dtype == np.float32) < 1.2 * sum(
        x.numel() for x in reference.parameters()
    )
    assert graph.path().stat().st_size < 200_000


@_stacked
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_no_weight_of_an_expert_is_transposed(family: str, tmp_path: Path) -> None:
    graph = captured(make_base(family, tmp_path / "base"), "portable", tmp_path / "out")
    model = onnx.load(graph.path(), load_external_data=False)
    readers = [
        (node.op_type, name)
        for node in _nodes(model.graph)
        for name in node.input
        if name.endswith((".gate_up_proj", ".down_proj"))
    ]
    assert readers
    assert {operator for operator, _ in readers} == {"MatMul"}
    assert set(Counter(name for _, name in readers).values()) == {1}
    assert {node.domain for node in model.graph.node} == {""}
    assert "If" not in {node.op_type for node in model.graph.node}


@_stacked
def test_a_few_tokens_take_their_own_experts_only(tmp_path: Path) -> None:
    """The two branches agree, and each holds its own work."""
    base = make_base("qwen3_moe", tmp_path / "base", num_experts=12, num_experts_per_tok=3)
    graph = captured(base, "fused", tmp_path / "out")
    model = onnx.load(graph.path())
    choices = [node for node in model.graph.node if node.op_type == "If"]
    assert len(choices) == 2
    for node in choices:
        few, many = (attribute.g for attribute in node.attribute)
        if "then" not in node.attribute[0].name:
            few, many = many, few
        kinds = [Counter(x.op_type for x in branch.node) for branch in (few, many)]
        assert (kinds[0]["Gather"], kinds[0]["MatMul"]) == (2, 2)
        assert (kinds[1]["Gather"], kinds[1]["MatMul"]) == (0, 2)
    limits = [
        int(onnx.numpy_helper.to_array(node.attribute[0].t))
        for node in model.graph.node
        if node.op_type == "Constant" and node.output[0].endswith(".limit")
    ]
    assert limits == [6, 6]
    figures = checked(graph, resolve_base(base))
    assert figures["cases"]["decode, one row"]["logit_error"] <= 1e-5


@_stacked
@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
@pytest.mark.parametrize("change", [{"num_experts_per_tok": 3}, {"norm_topk_prob": False}])
def test_another_routing_is_noticed(change: dict[str, Any], form: Form, tmp_path: Path) -> None:
    """The control: the same weights with another routing must fail the base check."""
    base = make_base("qwen3_moe", tmp_path / "base", num_experts_per_tok=2)
    other = make_base("qwen3_moe", tmp_path / "other", **{"num_experts_per_tok": 2, **change})
    graph = captured(other, form, tmp_path / "out")
    with pytest.raises(CaptureError, match="differs"):
        checked(graph, resolve_base(base))


@_stacked
@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
def test_a_forgotten_correction_of_scores_is_noticed(form: Form, tmp_path: Path) -> None:
    base = make_base("glm4_moe", tmp_path / "base")
    graph = captured(base, form, tmp_path / "out")
    model = onnx.load(graph.path())
    (bias,) = [x for x in model.graph.initializer if x.name.endswith("e_score_correction_bias")]
    array = onnx.numpy_helper.to_array(bias)
    assert np.abs(array).min() > 0
    bias.CopyFrom(onnx.numpy_helper.from_array(array[::-1] * 20, bias.name))
    onnx.save(model, graph.path())
    with pytest.raises(CaptureError, match="differs"):
        checked(graph, resolve_base(base))


@_stacked
def test_only_layers_on_unflattened_tokens_are_sites(tmp_path: Path) -> None:
    """A gate for each row fits `[batch, seq, in]` only, and the shared expert has that."""
    graph = captured(make_base("qwen2_moe", tmp_path / "base"), "portable", tmp_path / "out")
    linears = {path for path, layer in graph.modules.items() if layer.kind == "linear"}
    sites = {path.removeprefix("model.layers.0.") for path in linears}
    shared = {"gate_proj", "up_proj", "down_proj"}
    assert {f"mlp.shared_expert.{name}" for name in shared} | {"mlp.shared_expert_gate"} <= sites
    assert not [path for path in sites if path.endswith((".gate", "experts"))]
    model = onnx.shape_inference.infer_shapes(onnx.load(graph.path()))
    ranks = {x.name: len(x.type.tensor_type.shape.dim) for x in model.graph.value_info}
    for node in model.graph.node:
        if node.name in linears:
            assert ranks.get(node.input[0], 3) == 3, node.name


@_stacked
def test_a_linear_layer_on_flattened_tokens_is_no_site() -> None:
    from lora_edge.capture.experts import swapped_experts

    config = AutoConfig.for_model(
        "hunyuan_v1_moe",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        moe_topk=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with swapped_experts(model, sparse=False) as flattened, torch.no_grad():
        model(input_ids=torch.ones(2, 3, dtype=torch.long))
        assert flattened == {"model.layers.0.mlp.gate.wg"}
    before = copy.copy(model.model.layers[0].mlp.gate.forward)
    assert before.__self__ is model.model.layers[0].mlp.gate  # the swap is undone


@_stacked
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt_oss", ["gpt_oss", "s_aux"]),  # attention sinks
        ("deepseek_v2", ["deepseek_v2", "value heads"]),
        ("deepseek_v3", ["deepseek_v3", "value heads"]),
        ("gemma4_text", ["gemma4_text", "rope_type", "proportional"]),
        ("jetmoe", ["jetmoe", "JetMoeParallelExperts", "no common experts interface"]),
    ],
)
@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
def test_refused_by_name(family: str, form: Form, words: list[str], tmp_path: Path) -> None:
    base = make_base(family, tmp_path / "base")
    with pytest.raises(UnsupportedModelError) as caught:
        captured(base, form, tmp_path / "out")
    assert all(word in str(caught.value) for word in words)
    assert caught.value.hint
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(_FIVE, reason="transformers 5 stacks the experts of these models")
@pytest.mark.optimum
@pytest.mark.parametrize("backend", ["trace", "optimum"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_a_loop_are_refused(
    family: str, backend: Literal["trace", "optimum"], tmp_path: Path
) -> None:
    base = resolve_base(make_base(family, tmp_path / "base"))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\..*experts.*in a loop") as caught:
        capture(base, tmp_path, backend=backend)
    assert family in str(caught.value)
    assert "transformers 5" in caught.value.hint


class _Looped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 6) for _ in range(3))


def test_experts_in_a_module_list_are_refused_whatever_the_config_says() -> None:
    from lora_edge.base.experts import refuse_loops

    block = torch.nn.Module()
    block.mlp = _Looped()
    with pytest.raises(UnsupportedModelError, match=r"some.*mlp\.experts.*separate linear layers"):
        refuse_loops(block, "some", None)
    with pytest.raises(UnsupportedModelError, match="num_experts is 4"):
        refuse_loops(torch.nn.Linear(2, 3), "some", "num_experts is 4")
    refuse_loops(torch.nn.Linear(2, 3), "some", None)


@_stacked
def test_other_tasks_are_refused_by_name(tmp_path: Path) -> None:
    base = resolve_base(make_base("mixtral", tmp_path / "base"))
    task = Task("text-classification", 3)
    with pytest.raises(UnsupportedModelError, match=r"mixtral.*text-classification.*num_local"):
        capture(base, tmp_path, task)
