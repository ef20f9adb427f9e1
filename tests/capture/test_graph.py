"""What a captured graph looks like: names, layouts, files; and what a capture leaves behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_edge.base.checkpoint import resolve_base
from lora_edge.capture import BaseGraph, capture
from lora_edge.capture.swaps import RotarySwap, swapped_norms
from tests.support.families import make_base

Form = Literal["fused", "portable"]


def _capture(base: Path, form: Form, folder: Path) -> tuple[BaseGraph, onnx.ModelProto]:
    folder.mkdir()
    graph = capture(resolve_base(base), folder, form=form)
    return graph, onnx.load(graph.path())


def _tensors(model: onnx.ModelProto) -> dict[str, Any]:
    return {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}


@pytest.mark.parametrize("form", ["fused", "portable"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "gpt_neox"])
def test_each_linear_is_one_named_matmul_in_out(family: str, form: Form, tmp_path: Path) -> None:
    base = make_base(family, tmp_path / "base")
    graph, model = _capture(base, form, tmp_path / "out")
    tensors = _tensors(model)
    nodes = {node.name: node for node in model.graph.node if node.op_type == "MatMul"}
    readers = {name: [n for n in model.graph.node if name in n.input] for name in tensors}
    linears = {path: x for path, x in graph.modules.items() if x.kind == "linear"}
    assert set(linears) <= set(nodes)
    for path, linear in linears.items():
        if path == graph.head and graph.tied:
            continue
        weight = tensors[f"{path}.weight"]
        assert nodes[path].input[1] == f"{path}.weight"
        assert weight.shape == (linear.in_features, linear.out_features)
        assert len(readers[f"{path}.weight"]) == 1
        if f"{path}.bias" in tensors:
            (add,) = readers[f"{path}.bias"]
            assert add.op_type == "Add"
            assert nodes[path].output[0] in add.input


@pytest.mark.parametrize("form", ["fused", "portable"])
def test_weights_are_the_checkpoints(form: Form, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    _, model = _capture(base, form, tmp_path / "out")
    tensors = _tensors(model)
    reference = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, value in reference.items():
        wanted = value.numpy()
        linear = name.endswith(("_proj.weight", "lm_head.weight"))
        np.testing.assert_array_equal(tensors[name], wanted.T if linear else wanted)


def test_large_tensors_are_in_the_data_file(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", max_position_embeddings=4096)
    graph, _ = _capture(base, "fused", tmp_path / "out")
    assert sorted(path.name for path in graph.path().parent.iterdir()) == [
        "model.onnx",
        "model.onnx_data",
    ]
    assert graph.path().stat().st_size < 100_000
    model = onnx.load(graph.path(), load_external_data=False)
    assert not [x.name for x in model.graph.initializer if len(x.raw_data) > 1024]
    places = [
        {entry.key: entry.value for entry in x.external_data} for x in model.graph.initializer
    ]
    assert all(int(place["offset"]) % 4096 == 0 for place in places if place)


@pytest.mark.parametrize(
    ("form", "third", "padding", "kind"),
    [
        ("fused", "num_logits_to_keep", "right", "shared"),
        ("portable", "position_ids", "either", "concatenated"),
    ],
)
def test_interface(form: Form, third: str, padding: str, kind: str, tmp_path: Path) -> None:
    graph, model = _capture(make_base("llama", tmp_path / "base"), form, tmp_path / "out")
    past = [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    inputs = [x.name for x in model.graph.input if x.name not in past]
    assert inputs == ["input_ids", "attention_mask", third]
    part, cache = graph.reads, graph.reads.cache
    assert (part.padding, cache.kind) == (padding, kind)
    assert (cache.layers, cache.kv_heads, cache.head_dim) == (2, 2, 32)
    assert (part.vocab_size, part.max_length, part.backend) == (256, 128, "trace")
    assert set(graph.versions) == {"torch", "transformers", "onnx"}


@pytest.mark.parametrize(
    ("family", "inside", "outside"),
    [
        ("llama", 2, 0),
        ("gpt_neox", 0, 4),  # rotates a quarter of each head, too few for the operator
        ("smollm3", 1, 0),  # one of the two layers has no rotary
        ("gpt2", 0, 0),
    ],
)
def test_rotary_is_inside_the_operator_where_it_can_be(
    family: str, inside: int, outside: int, tmp_path: Path
) -> None:
    _, model = _capture(make_base(family, tmp_path / "base"), "fused", tmp_path / "out")
    flags = [
        next(a.i for a in node.attribute if a.name == "do_rotary")
        for node in model.graph.node
        if node.op_type == "GroupQueryAttention"
    ]
    assert len(flags) == 2
    assert sum(flags) == inside
    rotary = [node for node in model.graph.node if node.op_type == "RotaryEmbedding"]
    assert len(rotary) == outside
    takes_positions = "position_ids" in {value.name for value in model.graph.input}
    assert takes_positions == (family in {"gpt_neox", "gpt2"})


def test_logits_are_those_of_the_last_tokens(tmp_path: Path) -> None:
    graph, _ = _capture(make_base("llama", tmp_path / "base"), "fused", tmp_path / "out")
    session = onnxruntime.InferenceSession(graph.path(), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(3, 256, (2, 6))
    empty = np.zeros((2, 2, 0, 32), np.float32)
    feeds = {
        "input_ids": ids,
        "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2]),
        **{x.name: empty for x in session.get_inputs() if x.name.startswith("past")},
    }

    def logits(keep: np.ndarray) -> np.ndarray:
        (found,) = session.run(["logits"], {**feeds, "num_logits_to_keep": keep})
        return found

    every, last, three = logits(np.array(0)), logits(np.array(1)), logits(np.array(3))
    assert (last.shape, three.shape, every.shape) == ((2, 1, 256), (2, 3, 256), (2, 6, 256))
    # The shorter row's last token is its fourth.
    np.testing.assert_allclose(last[:, 0], every[[0, 1], [5, 3]], atol=1e-5)
    assert np.abs(last[1, 0] - every[1, 5]).max() > 1e-2
    np.testing.assert_allclose(three[0], every[0, 3:], atol=1e-5)
    np.testing.assert_allclose(three[1], every[1, 1:4], atol=1e-5)
    # More than there are: the first position fills up.
    np.testing.assert_allclose(logits(np.array(9))[1], every[1, [0, 0, 0, 1, 2, 3]], atol=1e-5)
    # onnxruntime-genai gives it an axis.
    np.testing.assert_array_equal(logits(np.array([0])), every)


def test_a_capture_does_not_change_later_models(tmp_path: Path) -> None:
    base = make_base("gemma2", tmp_path / "base")
    ids = torch.arange(3, 15)[None]
    config = AutoConfig.from_pretrained(base)
    before = AutoModelForCausalLM.from_pretrained(
        base, config=copy.deepcopy(config), attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = before(ids).logits
    _capture(base, "fused", tmp_path / "fused")
    _capture(base, "portable", tmp_path / "portable")
    after = AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation="eager")
    assert after.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(after(ids).logits, wanted)
        assert torch.equal(before(ids).logits, wanted)


class _OddRMSNorm(torch.nn.Module):
    """Adds epsilon outside the root."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8))
        self.eps = 1e-2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


def test_a_norm_of_another_formula_is_left_alone() -> None:
    norm = _OddRMSNorm()
    with swapped_norms(torch.nn.Sequential(norm)):
        assert "forward" not in vars(norm)
    plain = torch.nn.RMSNorm(8, eps=1e-6)
    with swapped_norms(torch.nn.Sequential(plain)):
        assert "forward" in vars(plain)
    assert "forward" not in vars(plain)


def test_a_rotation_of_another_formula_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    def backwards(q: Any, k: Any, cos: Any, sin: Any, *args: Any) -> Any:
        return original(q, k, cos, -sin, *args)

    original = modeling_llama.apply_rotary_pos_emb
    model = AutoModelForCausalLM.from_pretrained(make_base("llama", tmp_path / "base"))
    with RotarySwap(model, 128).applied():
        assert modeling_llama.apply_rotary_pos_emb is not original
    assert modeling_llama.apply_rotary_pos_emb is original
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", backwards)
    with RotarySwap(model, 128).applied():
        assert modeling_llama.apply_rotary_pos_emb is backwards
