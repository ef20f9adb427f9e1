"""Where a validation ran: machine, versions, sessions."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_edge import __version__
from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import DataError, OptionError
from lora_edge.parity.report import Session
from lora_edge.runtime import Runner, installed
from lora_edge.runtime.providers import resolve
from lora_edge.runtime.resident import CACHE_BYTES
from lora_edge.runtime.segmented import Cut

_LEAST, _SHARE = 64 << 20, 8  # bytes that a session keeps for later use, and its weights / those

LEVELS = ("disable", "basic", "extended", "all")
"""ONNX Runtime's levels of graph optimization."""


def machine() -> dict[str, str]:
    """The machine that runs this, in words."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """The packages of the bundle's side."""
    return {"lora-edge": __version__, **installed.versions()}


def reference_versions() -> dict[str, str]:
    """The packages of the reference, as far as they are installed."""
    found = {}
    for name in ("torch", "transformers", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def session_of(runner: Runner, optimization: str | None, left_out: Sequence[str] = ()) -> Session:
    """What a report says of an open session; ``left_out``: cases that its graph has no room for."""
    static = any(part.is_static for part in runner.session.parts.values())
    return Session(
        runner.session.provider.target.name,
        optimization or "all",
        runner.bundle.manifest.precision,
        runner.session.placement(),
        runner.session.segments,
        left_out=tuple(left_out),
        graph=runner.graph_file if static else "",
    )


def combinations(
    providers: str | Sequence[str], optimizations: str | Sequence[str] | None, *, full: bool
) -> list[tuple[str, str]]:
    """Every provider with every level of optimization, the strongest level first.

    Raises:
        DataError: a list is empty, or a level is unknown.
        ProviderError: a provider is not available.
    """
    given = [providers] if isinstance(providers, str) else list(providers)
    names = list(dict.fromkeys(resolve(name).target.name for name in given))
    if optimizations is None:
        levels = list(LEVELS) if full else ["all"]
    else:
        levels = [optimizations] if isinstance(optimizations, str) else list(optimizations)
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels or not names:
        raise DataError(
            f"optimization is {unknown[0]!r}" if unknown else "there is no session to run",
            f"Levels are {', '.join(LEVELS)}; providers as `lora-edge run` takes them.",
        )
    levels.sort(key=LEVELS.index, reverse=True)
    return [(name, level) for name in names for level in dict.fromkeys(levels)]


def weight_bytes(bundle: Bundle) -> int:
    """Bytes of a bundle's graphs and their weights."""
    files = bundle.manifest.files.items()
    return sum(entry.bytes for name, entry in files if name.startswith("onnx/"))


def _kept_by(bundle: Bundle) -> int:
    """Bytes that a session keeps: no batch of a proof has the next one's size."""
    return min(CACHE_BYTES, max(_LEAST, weight_bytes(bundle) // _SHARE))


@dataclass(frozen=True)
class Opening:
    """How the sessions of a validation are opened.

    Attributes:
        sessions: each provider with each level of optimization.
        options: own options of the one provider that is not ``cpu``.
        allow_fallback: let the CPU run what a provider does not take.
        cut: how graphs are cut that run in parts, on the CPU; ``None``: they run whole.
        clients: name of another runtime, which stands for a provider -> what starts its driver.

    Raises:
        OptionError: options, and not one provider that they are for.
    """

    sessions: tuple[tuple[str, str], ...]
    options: Mapping[str, str]
    allow_fallback: bool
    cut: Cut | None = None
    clients: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        others = {name for name, _ in self.sessions} - {"cpu", *self.clients}
        if self.options and len(others) != 1:
            raise OptionError(
                f"provider options are for one provider, got {', '.join(sorted(others)) or 'cpu'}",
                "Name one provider beside cpu, or leave the options out.",
            )

    def runner(
        self,
        bundle: Bundle,
        provider: str,
        level: str,
        *,
        exact: bool = True,
        static: bool | None = None,
    ) -> Runner:
        """The bundle in one of the sessions.

        Args:
            bundle: the bundle.
            provider: the session's, and ``level``, its optimizations.
            level: as above.
            exact: computing in floats, as it is proved.
            static: on the graph with fixed shapes; None: as the provider takes it.
        """
        if provider in self.clients:
            from lora_edge.parity.inside import InsideRunner

            return InsideRunner(bundle, self.clients[provider], provider, exact=exact)
        options: dict[str, Any] = {
            "provider": provider,
            "exact": exact,
            "optimization": level,
            "cache_bytes": _kept_by(bundle),
            "allow_fallback": self.allow_fallback,
            "provider_options": {} if provider == "cpu" else self.options,
            "static": static,
        }
        if self.cut is None or provider != "cpu" or static:
            return Runner(bundle, **options)
        from lora_edge.parity.in_parts import RunnerInParts

        return RunnerInParts(bundle, self.cut, **options)

    def words(self) -> list[str]:
        """The same as options of the command line."""
        words: list[str] = []
        for name in dict.fromkeys(name for name, _ in self.sessions):
            words += ["--in" if name in self.clients else "--provider", name]
        for key, value in self.options.items():
            words += ["--provider-option", f"{key}={value}"]
        if self.allow_fallback:
            words.append("--allow-fallback")
        for level in dict.fromkeys(level for _, level in self.sessions if level):
            words += ["--optimization", level]
        return words
