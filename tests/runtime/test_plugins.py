"""Providers in packages of their own, with packages and an ONNX Runtime that a test makes up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest

from lora_edge.errors import OptionError, ProviderError
from lora_edge.runtime import plugins, providers
from lora_edge.targets.providers import unknown

PLUGIN = """
def get_ep_names():
    return [{name!r}]
def get_library_path():
    return {path!r}
"""


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Two plugins, one module that is none, one that cannot be imported; what was registered."""
    library = tmp_path / "libabacus.so"
    library.write_bytes(b"\0beads\0")
    modules = {
        "onnxruntime_abacus": PLUGIN.format(name="AbacusExecutionProvider", path=str(library)),
        "onnxruntime_qnn": PLUGIN.format(name="QNNExecutionProvider", path=str(library)),
        "onnxruntime_tools": "",
        "onnxruntime_broken": "import no_such_module",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    seen: list[tuple[str, str]] = []

    def device(name: str, kind: str) -> Any:
        return SimpleNamespace(
            ep_name=name, device=SimpleNamespace(type=SimpleNamespace(name=kind))
        )

    def devices() -> list[Any]:
        known = [name for name, _ in seen if name == "AbacusExecutionProvider"]
        return [device(name, kind) for name in known for kind in ("CPU", "GPU")]

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        ort, "register_execution_provider_library", lambda *x: seen.append(x), raising=False
    )
    monkeypatch.setattr(ort, "get_ep_devices", devices, raising=False)
    plugins.packages.cache_clear()
    plugins._devices.cache_clear()
    yield seen
    plugins.packages.cache_clear()
    plugins._devices.cache_clear()
    for name in modules:
        sys.modules.pop(name, None)


def test_a_plugin_is_found_and_registered_once(
    registered: list[tuple[str, str]], tmp_path: Path
) -> None:
    assert {"abacus", "qnn"} <= set(providers.available())
    assert registered == []  # nothing is loaded by looking
    for name in ("abacus", "AbacusExecutionProvider"):
        provider = providers.resolve(name, {"beads": "10"})
        assert provider.target == unknown("AbacusExecutionProvider")
        assert provider.target.name == "abacus"
        assert provider.options == {"beads": "10"}
        assert [x.device.type.name for x in provider.devices] == ["GPU"]
    assert registered == [("AbacusExecutionProvider", str(tmp_path / "libabacus.so"))]


def test_the_device_can_be_chosen(registered: list[tuple[str, str]]) -> None:
    (found,) = providers.resolve("abacus", {"device": "cpu"}).devices
    assert found.device.type.name == "CPU"
    with pytest.raises(OptionError, match="no device of kind 'npu'; it has CPU, GPU"):
        providers.resolve("abacus", {"device": "npu"})
    assert registered


def test_what_a_plugin_cannot_do_is_said(registered: list[tuple[str, str]]) -> None:
    with pytest.raises(ProviderError, match="QNNExecutionProvider of onnxruntime_qnn finds no"):
        providers.resolve("qnn")
    with pytest.raises(OptionError, match="AbacusExecutionProvider has no option 'pebbles'"):
        providers.resolve("abacus", {"pebbles": "3"})
    with pytest.raises(ProviderError, match=r"'slide_rule' is unknown; available: .*abacus"):
        providers.resolve("slide_rule")
    assert [name for name, _ in registered] == ["QNNExecutionProvider"]


def test_a_library_that_does_not_load_is_an_error(
    registered: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: str) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : it needs version 30\nmore")

    monkeypatch.setattr(ort, "register_execution_provider_library", refuse, raising=False)
    with pytest.raises(ProviderError, match=r"cannot be loaded.*it needs version 30$"):
        providers.resolve("abacus")
    assert registered == []


def test_the_devices_are_given_to_the_session(
    registered: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    class Options(ort.SessionOptions):  # type: ignore[misc]
        def add_provider_for_devices(self, devices: Any, options: Any) -> None:
            given.append((devices, options))

    class Session:
        def __init__(self, _path: str, _options: Any, **how: Any) -> None:
            assert "providers" not in how

        def get_providers(self) -> list[str]:
            return ["AbacusExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            return []

    monkeypatch.setattr(ort, "SessionOptions", Options)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    provider = providers.resolve("abacus", {"beads": "10"})
    providers.open_session(tmp_path / "model.onnx", provider)
    assert given == [(list(provider.devices), {"beads": "10"})]
    assert registered


def test_qnn_gets_its_htp_unless_another_backend_is_chosen(
    registered: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "QNNExecutionProvider"
    assert plugins.defaults("AbacusExecutionProvider", None, ()) == {}
    assert plugins.defaults(name, None, ()) == {}  # a package that does not say where it is
    package = plugins.packages()[name]
    monkeypatch.setattr(package, "get_qnn_htp_path", lambda: "/htp.so", raising=False)
    monkeypatch.setattr(plugins.platform, "machine", lambda: "aarch64")
    assert plugins.defaults(name, "npu", ("profiling_level",)) == {"backend_path": "/htp.so"}
    monkeypatch.setattr(plugins.platform, "machine", lambda: "AMD64")
    emulated = {"backend_path": "/htp.so", "soc_model": "69", "htp_arch": "75"}
    assert plugins.defaults(name, None, ()) == emulated
    assert plugins.defaults(name, "gpu", ()) == {}
    assert plugins.defaults(name, None, ("backend_path",)) == {}
    assert registered == []
