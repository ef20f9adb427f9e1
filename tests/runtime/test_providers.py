from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest

from lora_edge.errors import BundleError, ProviderError
from lora_edge.runtime import providers
from lora_edge.runtime.decoder import Decoder


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider"])
def test_the_cpu_is_found_under_its_names(name: str) -> None:
    provider = providers.resolve(name)
    assert (provider.name, provider.ort_name) == ("cpu", "CPUExecutionProvider")
    assert provider.zero_rank


@pytest.mark.parametrize(
    ("name", "what"), [("abacus", "is unknown"), ("coreml", "is not in this installation")]
)
def test_what_is_not_there_is_refused_with_what_is(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=f"'{name}' {what}.*available: cpu$") as error:
        providers.resolve(name)
    assert error.value.hint


def test_a_provider_that_does_not_start_is_an_error(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tmp_path / "model.onnx"
    onnx.save(tiny.graph("portable", sites=False), graph)
    provider = providers.Provider("cuda", "CUDAExecutionProvider", "cuda", False)

    class Fallen:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", lambda *_args, **_kwargs: Fallen())
    with pytest.raises(ProviderError, match="fell back to CPUExecutionProvider"):
        providers.open_session(graph, provider)


@pytest.mark.parametrize(("fallback", "entry"), [(False, "1"), (True, None)])
def test_falling_back_to_the_cpu_is_opt_in(
    fallback: bool, entry: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def refuse(_path: str, options: Any, **_kwargs: Any) -> None:
        seen.append(options)
        raise RuntimeError("two nodes were left to the CPU\nand a long trace")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    provider = providers.Provider("cuda", "CUDAExecutionProvider", "cuda", False)
    with pytest.raises((ProviderError, BundleError), match=r"two nodes were left to the CPU$"):
        providers.open_session(tmp_path / "model.onnx", provider, allow_fallback=fallback)
    try:
        found = seen[0].get_session_config_entry("session.disable_cpu_ep_fallback")
    except RuntimeError:  # ONNX Runtime's way to say that there is no such entry
        found = None
    assert found == entry


def test_placement_names_every_operator(tiny: Any, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    onnx.save(tiny.graph("fused", sites=False), graph)
    placed = Decoder(graph, tiny.spec("fused")).placement()
    assert placed is not None
    assert set(placed) == {"CPUExecutionProvider"}
    assert placed["CPUExecutionProvider"]["com.microsoft::GroupQueryAttention"] == 2


def test_bad_settings_and_bad_graphs(tiny: Any, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"nothing")
    with pytest.raises(ProviderError, match="optimization is 'best', expected one of disable"):
        Decoder(graph, tiny.spec("fused"), optimization="best")
    with pytest.raises(BundleError, match="cannot be loaded"):
        Decoder(graph, tiny.spec("fused"))
