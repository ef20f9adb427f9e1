"""The optimum backend: right against PyTorch, a second opinion on our own graphs, or missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest

from lora_edge.base.checkpoint import resolve_base
from lora_edge.capture import capture
from lora_edge.errors import CaptureError, MissingDependencyError, UnsupportedModelError
from tests.support.checks import checked
from tests.support.families import make_base

_INSTALLED = importlib.util.find_spec("optimum") is not None
_needed = pytest.mark.skipif(not _INSTALLED, reason="needs lora-edge[optimum] (transformers 4.57)")


@pytest.mark.skipif(_INSTALLED, reason="tests the message where optimum-onnx is not installed")
def test_missing_optimum_names_the_extra(tmp_path: Path) -> None:
    base = resolve_base(make_base("llama", tmp_path / "base"))
    with pytest.raises(MissingDependencyError, match="optimum") as caught:
        capture(base, tmp_path, backend="optimum")
    assert "lora-edge[optimum]" in caught.value.hint


@_needed
@pytest.mark.optimum
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "phi3"])
def test_family_equals_pytorch(family: str, tmp_path: Path) -> None:
    base = resolve_base(make_base(family, tmp_path / "base"))
    folder = tmp_path / "out"
    folder.mkdir()
    graph = capture(base, folder, backend="optimum")
    assert (graph.reads.form, graph.reads.backend, graph.reads.padding) == (
        "foreign",
        "optimum",
        "left",
    )
    assert graph.reads.cache.kind == "concatenated"
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx_data"]
    onnx.checker.check_model(str(graph.path()))
    figures = checked(graph, base)
    assert max(case["logit_error"] for case in figures["cases"].values()) <= 1e-5
    assert figures["window_covered"]
    assert graph.versions["transformers"].startswith("4.57")


@_needed
@pytest.mark.optimum
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_another_softcap_is_noticed(tmp_path: Path) -> None:
    """The control: optimum's graph of a model whose scores are bounded elsewhere must fail."""
    base = resolve_base(make_base("gemma2", tmp_path / "base"))
    other = resolve_base(make_base("gemma2", tmp_path / "other", attn_logit_softcapping=50.0))
    folder = tmp_path / "out"
    folder.mkdir()
    graph = capture(other, folder, backend="optimum")
    with pytest.raises(CaptureError):
        checked(graph, base)


@_needed
@pytest.mark.optimum
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    base = resolve_base(make_base("mixtral", tmp_path / "base", num_local_experts=4))
    with pytest.raises(UnsupportedModelError, match="mixtral") as caught:
        capture(base, tmp_path, backend="optimum")
    assert caught.value.hint
