"""OpenVINO GenAI's pipeline, stepped through: what it is told, on a stand-in for its modules.

``ci/bench table --rows openvino`` runs the real one, and compares what it computes.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lora_edge.bench.players.openvino import OpenvinoPlayer
from lora_edge.errors import ProviderError


class _Handle:
    def __init__(self, prompt: Any, config: Any) -> None:
        self.prompt, self.config = prompt.tolist(), config
        self.waiting = self.made = 0
        self.gone = False

    def can_read(self) -> bool:
        return bool(self.waiting)

    def read(self) -> dict[int, Any]:
        self.waiting = 0
        return {0: SimpleNamespace(generated_ids=[41 + self.made], generated_log_probs=[-0.5])}

    def cancel(self) -> None:
        self.gone = True


class _Pipeline:
    def __init__(self, folder: str, scheduler: Any, device: str, options: dict[str, Any]) -> None:
        self.opened = folder, device, options
        self.scheduler = scheduler
        self.generated: list[Any] = []
        self.handles: list[_Handle] = []

    def generate(self, _: list[Any], configs: list[Any]) -> None:
        self.generated.append(configs[0])

    def add_request(self, number: int, prompt: Any, config: Any) -> _Handle:
        assert number == len(self.handles) + 1
        self.handles.append(_Handle(prompt, config))
        return self.handles[-1]

    def step(self) -> None:
        for handle in self.handles:
            if not handle.gone and handle.made < handle.config.max_new_tokens:
                handle.waiting += 1
                handle.made += 1


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    ov, genai = ModuleType("openvino"), ModuleType("openvino_genai")
    ov.__dict__["Tensor"] = lambda array: array
    genai.__dict__.update(
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=lambda: SimpleNamespace(adapters=None),
        Adapter=lambda file: ("adapter", file),
        AdapterConfig=lambda adapter, alpha: (*adapter, alpha),
        ContinuousBatchingPipeline=_Pipeline,
    )
    monkeypatch.setitem(sys.modules, "openvino", ov)
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)


def _opened(**more: Any) -> tuple[OpenvinoPlayer, _Pipeline]:
    given = {"threads": 3, "folder": "model", "exact": False, "room": 64, **more}
    player = OpenvinoPlayer(given)
    player.imports()
    player.open()
    pipeline: Any = player._pipeline
    return player, pipeline


def test_a_batch_runs_alone_and_a_step_is_a_token() -> None:
    player, pipeline = _opened()
    player.start("a", [[5, 6]], [None], 8)
    player.step("a", [1])
    (first,) = pipeline.handles
    assert (first.prompt, first.made, first.gone) == ([[5, 6]], 2, False)
    assert first.config.max_new_tokens == 8
    player.start("b", [[7]], [None], 8)
    player.step("b", [1])
    assert [(x.made, x.gone) for x in pipeline.handles] == [(2, True), (2, False)]
    player.drop("b")
    assert pipeline.handles[1].gone


def test_the_first_token_is_that_of_the_prompt() -> None:
    player, pipeline = _opened()
    player.start("a", [[5, 6]], [None], 8)
    assert player.logits("a") is None
    assert player.first("a") == (42, -0.5)
    assert pipeline.handles[1].prompt == [[5, 6]]
    assert pipeline.handles[1].config.logprobs == 1
    assert pipeline.handles[0].config.logprobs == 0  # what is measured computes none


def test_an_adapter_is_on_before_the_first_request() -> None:
    assert not _opened()[1].generated
    player, pipeline = _opened(lora="a.safetensors", alpha=2.0)
    adapter = ("adapter", "a.safetensors", 2.0)
    assert [config.adapters for config in pipeline.generated] == [adapter]
    assert pipeline.opened[2]["adapters"] == adapter
    player.start("a", [[5]], ["a"], 8)
    assert pipeline.handles[0].config.adapters == adapter


def test_float32_is_asked_for_where_the_bundle_is() -> None:
    assert _opened()[1].opened == ("model", "CPU", {"INFERENCE_NUM_THREADS": 3})
    options = _opened(exact=True)[1].opened[2]
    assert options["INFERENCE_PRECISION_HINT"] == options["KV_CACHE_PRECISION"] == "f32"


def test_a_step_without_a_token_is_an_error() -> None:
    player, _ = _opened()
    player.start("a", [[5, 6]], [None], 1)
    with pytest.raises(ProviderError, match="has made no token in a step"):
        player.step("a", [1])
