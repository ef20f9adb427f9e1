"""Who can be compared with: what each needs, and in which figures it takes part.

Knows folders and names; imports none of the libraries that it names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_edge.bench.plan import Entry, Taker, Work
from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.clients import GENAI_FILE
from lora_edge.errors import OptionError
from lora_edge.names import NONE_ADAPTER


@dataclass(frozen=True)
class Given:
    """What the rivals of a bundle are made from.

    Attributes:
        bundle: the bundle.
        adapter: the one that is on; empty: the bundle has none.
        room: positions, for those that take a cache once.
        files: name -> path, of ``merged``, ``genai``, ``openvino``, ``optimum``, ``llama.cpp``,
            ``llama.cpp-lora`` and ``llama.cpp-library``.
        base: the base model's folder or hub id; empty: none was given.
        peft: adapter -> PEFT folder, where not the bundle's own.
        pythons: rival -> interpreter.
    """

    bundle: Bundle
    adapter: str
    room: int
    files: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    peft: Mapping[str, str] = field(default_factory=dict)
    pythons: Mapping[str, str] = field(default_factory=dict)

    def computes(self, adapter: str) -> str:
        """The word for what rivals in float32 compute; empty where the bundle is rounded."""
        if self.bundle.manifest.precision != "fp32":
            return ""
        return f"adapter {adapter}" if adapter else "base"

    def peft_folder(self, adapter: str) -> str:
        """The PEFT files of an adapter; the bundle has them."""
        return self.peft.get(adapter) or str(self.bundle.directory / "adapters" / adapter / "peft")


@dataclass(frozen=True)
class Way:
    """One line of a rival in the tables: a process, and the adapter that is on there.

    Attributes:
        entry: the process.
        adapter: ``None`` is none.
        computes: as of a :class:`~lora_edge.bench.plan.Taker`.
    """

    entry: Entry
    adapter: str | None
    computes: str


@dataclass(frozen=True)
class Rival:
    """Another way to run the same model.

    Attributes:
        name: as ``--against`` takes it.
        ways: off, on, or both.
        reason: why it does not take part, in one line; empty: it does.
        mixes: it takes a batch whose rows use different adapters.
        loads: it loads adapters by itself, and switches between them.
        bytes: of its files, where they are its own.
    """

    name: str
    ways: tuple[Way, ...] = ()
    reason: str = ""
    mixes: bool = False
    loads: bool = False
    bytes: int = 0

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Its processes."""
        return tuple(way.entry for way in self.ways)

    def takers(self, work: Work) -> tuple[Taker, ...]:
        """Its lines in a figure of one row, or of what a process has once."""
        return tuple(
            Taker(way.entry.key, way.entry.key, work, (way.adapter,), computes=way.computes)
            for way in self.ways
        )

    def batch(self, adapters: Sequence[str | None]) -> tuple[Taker, ...]:
        """Its line in a batch of different adapters."""
        if not self.mixes:
            return ()
        way = self.ways[-1]
        return (Taker(f"{self.name}, mixed batch", way.entry.key, "decode", tuple(adapters)),)

    def load(self, adapters: tuple[str | None, ...]) -> tuple[Taker, ...]:
        """Its line where an adapter is loaded; its process without one has not loaded any."""
        if not self.loads:
            return ()
        return (Taker(f"{self.name}, load", self.ways[0].entry.key, "load", adapters),)

    def switch(self, adapters: tuple[str | None, ...]) -> tuple[Taker, ...]:
        """Its line where loaded adapters are switched."""
        if not self.loads or self.name == "peft":
            return ()
        return (Taker(f"{self.name}, switch", self.ways[-1].entry.key, "switch", adapters),)


def rival(name: str, given: Given) -> Rival:
    """A rival by its name.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in RIVALS:
        raise OptionError(
            f"{name!r} is nobody that a bundle is compared with", f"There are {', '.join(RIVALS)}."
        )
    return RIVALS[name](given)


def _merged(given: Given) -> Rival:
    folder = given.files.get("merged")
    if folder is None:
        return _lacks("merged", "a merged bundle", "--with merged=DIR, or --base DIR to make one")
    entry = Entry("merged", "bundle", {"bundle": folder}, given.pythons.get("merged", ""))
    way = Way(entry, None, given.computes(given.adapter))
    return Rival("merged", (way,), bytes=_size(Path(folder) / "onnx"))


def _genai(given: Given) -> Rival:
    python = given.pythons.get("genai", "")
    folder = Path(given.files.get("genai", given.bundle.directory))
    if not (folder / GENAI_FILE).is_file():
        return Rival("genai", reason=f"{folder} has no {GENAI_FILE}")
    if "genai" in given.files:
        own = Entry("genai: " + folder.name, "genai", {"folder": str(folder)}, python)
        return Rival("genai", (Way(own, None, ""),), bytes=_size(folder))
    adapters = given.bundle.manifest.adapters
    found = {
        "folder": str(folder),
        "adapters": {
            x: str(given.bundle.path(y.half or y.file)) for x, y in adapters.items() if y.file
        },
        "none": NONE_ADAPTER if NONE_ADAPTER in adapters else None,
    }
    # The same graph, so that it computes the same whatever its precision.
    if given.bundle.manifest.mode == "merged":
        return Rival(
            "genai",
            (Way(Entry("genai", "genai", found, python), None, f"adapter {given.adapter}"),),
        )
    ways = [Way(Entry("genai, off", "genai", found, python), None, "base")]
    if given.adapter:
        on = Entry(f"genai, on: {given.adapter}", "genai", found, python)
        ways.append(Way(on, given.adapter, f"adapter {given.adapter}"))
    return Rival("genai", tuple(ways), loads=bool(given.adapter))


def _peft(given: Given) -> Rival:
    if not given.base:
        return _lacks("peft", "the base model", "--base DIR")
    python = given.pythons.get("peft", "")
    names = set(given.bundle.manifest.adapters) - {NONE_ADAPTER}
    found = {"base": given.base, "peft": {name: given.peft_folder(name) for name in sorted(names)}}
    ways = [Way(Entry("PyTorch, off", "peft", found, python), None, given.computes(""))]
    if given.adapter:
        on = Entry(f"PEFT, on: {given.adapter}", "peft", found, python)
        ways.append(Way(on, given.adapter, given.computes(given.adapter)))
    return Rival("peft", tuple(ways), mixes=len(ways) > 1, loads=len(ways) > 1)


def _optimum(given: Given) -> Rival:
    folder = given.files.get("optimum")
    if folder is None:
        return _lacks("optimum", "a folder that optimum-onnx wrote", "--with optimum=DIR")
    entry = Entry("optimum, off", "optimum", {"folder": folder}, given.pythons.get("optimum", ""))
    return Rival("optimum", (Way(entry, None, given.computes("")),), bytes=_size(Path(folder)))


def _openvino(given: Given) -> Rival:
    folder = given.files.get("openvino")
    if folder is None:
        return _lacks("openvino", "a folder that optimum-intel wrote", "--with openvino=DIR")
    python = given.pythons.get("openvino", "")
    exact = given.bundle.manifest.precision == "fp32"
    found = {"folder": folder, "exact": exact, "room": given.room}
    ways = [Way(Entry("openvino, off", "openvino", found, python), None, given.computes(""))]
    if given.adapter:
        peft = Path(given.peft_folder(given.adapter))
        scale = _plain_scale(peft)
        if scale is None:
            return Rival("openvino", reason=f"it takes LoRA of one rank alone; {peft} is another")
        lora = {"lora": str(peft / "adapter_model.safetensors"), "alpha": scale}
        on = Entry("openvino, on", "openvino", {**found, **lora}, python)
        ways.append(Way(on, given.adapter, given.computes(given.adapter)))
    return Rival("openvino", tuple(ways), bytes=_size(Path(folder)))


def _plain_scale(peft: Path) -> float | None:
    """What a LoRA's delta is multiplied by; ``None``: it is not the same everywhere, or no LoRA."""
    config = json.loads((peft / "adapter_config.json").read_text(encoding="utf-8"))
    other = (
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "alora_invocation_tokens",
    )
    if config.get("peft_type") != "LORA" or any(config.get(name) for name in other):
        return None
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)


def _llama_cpp(given: Given) -> Rival:
    file = given.files.get("llama.cpp")
    if file is None:
        return _lacks(
            "llama.cpp", "a GGUF file", "--with llama.cpp=FILE --with llama.cpp-lora=FILE"
        )
    library = given.files.get("llama.cpp-library")
    if library is None:
        return _lacks("llama.cpp", "its shared libraries", "--with llama.cpp-library=DIR")
    python = given.pythons.get("llama.cpp", "")
    exact = given.bundle.manifest.precision == "fp32"
    found = {"library": library, "file": file, "room": given.room, "exact": exact}
    off = Entry("llama.cpp, off", "llama.cpp", found, python)
    ways = [Way(off, None, given.computes(""))]
    lora = given.files.get("llama.cpp-lora")
    if lora is not None:
        on = Entry("llama.cpp, on", "llama.cpp", {**found, "lora": lora}, python)
        ways.append(Way(on, given.adapter or None, given.computes(given.adapter)))
    return Rival("llama.cpp", tuple(ways), bytes=_size(Path(file)))


def _lacks(name: str, what: str, option: str) -> Rival:
    return Rival(name, reason=f"it needs {what}: {option}")


def _size(path: Path) -> int:
    """Bytes of a file, or of what a folder holds."""
    if path.is_file():
        return path.stat().st_size
    return sum(x.stat().st_size for x in path.rglob("*") if x.is_file())


RIVALS: Mapping[str, Callable[[Given], Rival]] = {
    "merged": _merged,
    "genai": _genai,
    "llama.cpp": _llama_cpp,
    "openvino": _openvino,
    "peft": _peft,
    "optimum": _optimum,
}
