from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime as ort
import pytest

from lora_edge.cli.run import command as run
from lora_edge.cli.validate import command as validate
from lora_edge.errors import BundleError, OptionError, ProviderError
from lora_edge.runtime import providers
from lora_edge.targets.providers import provider as find
from lora_edge.targets.providers import unknown
from lora_edge.targets.target import Target


def named(name: str) -> Target:
    found = find(name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "cpuexecutionprovider"])
def test_the_cpu_is_found_under_its_names(name: str) -> None:
    provider = providers.resolve(name)
    assert provider.target == named("cpu")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("abacus", "is unknown"),
        ("coreml", "is not in this installation"),
        ("COREMLExecutionProvider", "is not in this installation"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=f"'{name}' {what}.*available: cpu$") as error:
        providers.resolve(name)
    assert error.value.hint


@pytest.mark.parametrize(
    ("name", "system", "way"),
    [
        ("cuda", "Linux", "pip uninstall -y onnxruntime; pip install onnxruntime-gpu"),
        ("qnn", "Linux", "pip install onnxruntime-qnn"),
        ("openvino", "Linux", "pip uninstall -y onnxruntime; pip install onnxruntime-openvino"),
        ("coreml", "Darwin", "pip install --upgrade onnxruntime"),
        ("directml", "Linux", "onnxruntime-directml of pip, on Windows"),
        (
            "xnnpack",
            "Linux",
            "com.microsoft.onnxruntime:onnxruntime-android of Maven, on Android, or "
            "onnxruntime-objc of CocoaPods, on iOS",
        ),
        ("abacus", "Linux", "the ONNX Runtime package that carries it"),
    ],
)
def test_what_is_not_there_is_refused_with_what_installs_it(
    name: str, system: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(providers.plugins, "packages", dict)
    monkeypatch.setattr(providers.installed, "wheels", lambda: {"onnxruntime": "1.32.0"})
    monkeypatch.setattr(platform, "system", lambda: system)
    with pytest.raises(ProviderError) as error:
        providers.resolve(name)
    assert error.value.hint == f"Choose one of these, or install it: {way}."


def test_options_of_the_target_are_set_unless_they_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CoreMLExecutionProvider"])
    monkeypatch.setattr(providers, "libraries", lambda _name: [])
    assert providers.resolve("coreml").options == {"ModelFormat": "MLProgram"}
    given = {"ModelFormat": "NeuralNetwork", "MLComputeUnits": "CPUOnly"}
    assert providers.resolve("coreml", given).options == given


def test_short_names_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ["AbacusExecutionProvider", "AzureExecutionProvider", "DmlExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*here, "CPUExecutionProvider"])
    monkeypatch.setattr(providers.plugins, "packages", dict)
    assert providers.available() == ("cpu", "directml", "abacus")
    assert providers.resolve("abacus").target == unknown("AbacusExecutionProvider")
    assert providers.resolve("directml") == providers.resolve("DmlExecutionProvider")
    with pytest.raises(ProviderError, match="'dml' is unknown"):
        providers.resolve("dml")


CUDA = providers.Provider(named("cuda"))
# What onnxruntime-gpu 1.31.1 writes to stderr where CUDA is not installed.
NO_CUBLAS = (
    "\x1b[1;31m2026-11-28 18:43:59 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] "
    "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:2043 onnxruntime::Provider& "
    "onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    "/x/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object "
    "file: No such file or directory\n\x1b[m\n"
    "\x1b[0;93m2026-11-28 18:43:59 [W:onnxruntime:Default, onnxruntime_pybind_state.cc:1295 "
    "CreateExecutionProviderFactoryInstance] Failed to create CUDAExecutionProvider. Require cuDNN "
    "9.* and CUDA 13.*.\x1b[m\n"
)


class _Fake:
    """A session whose nodes are where a test says."""

    def __init__(self, placed: dict[str, list[tuple[str, str]]], said: str = "") -> None:
        self._placed = placed
        os.write(2, said.encode())

    def get_providers(self) -> list[str]:
        return list(self._placed)

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(
                ep_name=name,
                get_nodes=lambda nodes=nodes: [
                    SimpleNamespace(name=node, op_type=operator, domain="")
                    for operator, node in nodes
                ],
            )
            for name, nodes in self._placed.items()
        ]


@pytest.fixture
def portable(tiny: Any, tmp_path: Path) -> Path:
    """A graph whose nodes have names."""
    model = tiny.graph("portable", sites=False)
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def _opened(
    monkeypatch: pytest.MonkeyPatch, graph: Path, session: Any, **options: Any
) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    class Session(_Fake):
        def __new__(cls, *_args: Any, **how: Any) -> Any:
            seen.update(how)
            return session()

    monkeypatch.setattr(ort, "InferenceSession", Session)
    providers.open_session(graph, options.pop("provider", CUDA), **options)
    return seen


def test_a_provider_that_does_not_start_is_an_error_with_its_cause(
    portable: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProviderError, match="fell back to CPUExecutionProvider"):
        _opened(monkeypatch, portable, lambda: _Fake({"CPUExecutionProvider": []}))
    with pytest.raises(ProviderError) as error:
        _opened(monkeypatch, portable, lambda: _Fake({"CPUExecutionProvider": []}, NO_CUBLAS))
    assert str(error.value) == (
        "CUDAExecutionProvider did not start: Failed to load library "
        "/x/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared "
        "object file: No such file or directory"
    )
    assert "Require cuDNN 9.* and CUDA 13.*." in error.value.hint
    assert "--provider cpu" in error.value.hint
    assert "pip install onnxruntime-gpu" in error.value.hint
    assert "CUDA and cuDNN" in error.value.hint
    assert capfd.readouterr().err == ""  # it is in the error instead


def test_a_backend_that_is_missing_is_no_start(
    portable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "[E:onnxruntime:, qnn.cc:2290 GetCapabilityImpl] Unable to load backend /nowhere.so\n"
    placed = {"CUDAExecutionProvider": [], "CPUExecutionProvider": []}
    with pytest.raises(ProviderError, match=r"did not start: Unable to load backend /nowhere\.so$"):
        _opened(monkeypatch, portable, lambda: _Fake(placed, said), allow_fallback=True)


def test_what_a_started_provider_says_is_passed_on(
    portable: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _opened(monkeypatch, portable, lambda: _Fake({"CUDAExecutionProvider": []}, "a word\n"))
    assert capfd.readouterr().err == "a word\n"


def _nodes(graph: Path, *operators: str) -> list[tuple[str, str]]:
    model = onnx.load(graph).graph
    return [(node.op_type, node.name) for node in model.node if node.op_type in operators]


def test_only_work_on_floats_may_not_stay_on_the_cpu(
    portable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    integers = [node for node in _nodes(portable, "CumSum", "GreaterOrEqual", "And", "Cast")]
    made = [("Gather", "Gather_token_43"), ("Gather", "Gather"), ("MemcpyToHost", "Memcpy")]
    assert len(integers) >= 4
    placed = {"CUDAExecutionProvider": [], "CPUExecutionProvider": [*integers, *made]}
    _opened(monkeypatch, portable, lambda: _Fake(placed))
    softmax = _nodes(portable, "Softmax")
    for floats in (softmax, [("FusedMatMul", "made by ONNX Runtime")]):
        placed["CPUExecutionProvider"] = [*integers, *floats]
        with pytest.raises(ProviderError, match=floats[0][0]) as error:
            _opened(monkeypatch, portable, lambda: _Fake(placed))
        assert str(error.value).endswith("; it runs 0 nodes")
        assert "--allow-fallback" in error.value.hint
        assert "onnxruntime-gpu" in error.value.hint
        _opened(monkeypatch, portable, lambda: _Fake(placed), allow_fallback=True)


@pytest.mark.parametrize(
    ("target", "there", "absent"),
    [
        (named("openvino"), ["the form to export for it is --form portable"], ["fixed", "merged"]),
        (named("qnn"), ["--form portable", "fixed shapes only"], ["merged"]),
        (
            named("xnnpack"),
            ["--mode merged leaves fewer", "constant weights only"],
            ["--form", "fixed"],
        ),
        (named("cuda"), ["--form portable has operators that more"], ["fixed", "merged"]),
        (unknown("AbacusExecutionProvider"), ["--form portable has operators"], ["fixed"]),
    ],
)
def test_the_hint_names_what_the_target_takes(
    target: Target,
    there: list[str],
    absent: list[str],
    portable: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placed = {target.ort_name: [], "CPUExecutionProvider": _nodes(portable, "Softmax")}
    provider = providers.Provider(target)
    with pytest.raises(ProviderError) as error:
        _opened(monkeypatch, portable, lambda: _Fake(placed), provider=provider)
    assert all(words in error.value.hint for words in ["--allow-fallback", *there])
    assert not any(words in error.value.hint for words in absent)


def test_the_hinted_option_is_one_of_the_commands() -> None:
    for verb in (run, validate):
        names = {name for parameter in verb.params for name in parameter.opts}
        assert {"--allow-fallback", "--provider-option", "--provider"} <= names


@pytest.mark.parametrize(("fallback", "entry"), [(False, "1"), (True, None)])
def test_where_placement_is_not_told_no_node_may_fall_back(
    fallback: bool, entry: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def refuse(_path: str, options: Any, **_kwargs: Any) -> None:
        seen.append(options)
        raise RuntimeError("two nodes were left by a fallback\nand a long trace")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(ProviderError, match=r"two nodes were left by a fallback$") as error:
        providers.open_session(tmp_path / "model.onnx", CUDA, allow_fallback=fallback)
    assert "--allow-fallback" in error.value.hint
    try:
        found = seen[0].get_session_config_entry("session.disable_cpu_ep_fallback")
    except RuntimeError:  # ONNX Runtime's way to say that there is no such entry
        found = None
    assert found == entry


def test_options_reach_the_provider(portable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = replace(CUDA, options={"device_id": "1"})
    placed = {"CUDAExecutionProvider": []}
    seen = _opened(monkeypatch, portable, lambda: _Fake(placed), provider=provider)
    assert seen["providers"] == [("CUDAExecutionProvider", {"device_id": "1"})]
    assert seen["enable_fallback"] == 0


def test_options_that_a_provider_cannot_know_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="the CPU provider takes no options, got threads"):
        providers.resolve("cpu", {"threads": "1"})
    folder = tmp_path / "capi"
    folder.mkdir()
    (folder / "libonnxruntime_providers_cuda.so").write_bytes(b"\0device_id\0gpu_mem_limit\0")
    (folder / "onnxruntime_pybind11_state.so").write_bytes(b"\0nonsense\0")
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert providers.resolve("cuda", {"device_id": "1"}).options == {"device_id": "1"}
    for odd in ("nonsense", ""):
        with pytest.raises(
            OptionError, match=f"CUDAExecutionProvider has no option {odd!r}"
        ) as error:
            providers.resolve("cuda", {"device_id": "1", odd: "3"})
        assert "Some that it has: device_id, gpu_mem_limit." in error.value.hint


def test_placement_names_every_operator(tiny: Any, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    onnx.save(tiny.graph("fused", sites=False), graph)
    decoder = tiny.decoder(graph, "fused", sites=False)
    placed = decoder.placement()
    if not hasattr(decoder.session, "get_provider_graph_assignment_info"):  # an older release
        assert placed is None
        return
    assert placed is not None
    assert set(placed) == {"CPUExecutionProvider"}
    assert placed["CPUExecutionProvider"]["com.microsoft::GroupQueryAttention"] == 2


def test_bad_settings_and_bad_graphs(tiny: Any, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"nothing")
    with pytest.raises(OptionError, match="optimization is 'best', expected one of disable"):
        tiny.decoder(graph, "fused", sites=False, optimization="best")
    with pytest.raises(BundleError, match="cannot be loaded"):
        tiny.decoder(graph, "fused", sites=False)
