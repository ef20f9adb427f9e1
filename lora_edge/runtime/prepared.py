"""ONNX Runtime's own optimized graphs of a bundle, kept on the device with their packed weights.

A session that is opened on them packs nothing: it maps the file, and every further session on the
same weights, in this process or another, maps the same pages. The layout belongs to the processor
and to the build of ONNX Runtime, so both are in the key, and nothing of it is ever shipped.
Knows files and sessions; knows nothing of adapters.
"""

from __future__ import annotations

import filecmp
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime as ort

from lora_edge import types as opt
from lora_edge.bundle.bundle import DATA_FILE, Bundle
from lora_edge.errors import BundleError
from lora_edge.files.hashes import hash_file
from lora_edge.files.json import read_object
from lora_edge.files.pages import trim
from lora_edge.files.sample import sample_file
from lora_edge.files.transaction import write_atomically

Start = Callable[[Path | bytes, Mapping[str, str], Path | None], Any]
"""Opens a graph: its path, or its bytes, whose data is where the graph's is that was asked for;
more of ONNX Runtime's settings; where it writes the optimized one."""


class Form(NamedTuple):
    """Another form of a bundle's graph, made on the device.

    Attributes:
        name: tells it from others, and from what another version of it would be.
        rewrite: the file's bytes -> those of the form, on the same data.
    """

    name: str
    rewrite: Callable[[bytes], bytes]


AS_IT_IS = Form("", bytes)

FOLDER_VARIABLE = "LORA_EDGE_CACHE"
LIMIT = 16 << 30
"""Bytes of all bundles' prepared graphs together; the longest unused go first."""

_WORTH = 32 << 20  # bytes of weights below which opening takes no time
_TIMES = 3  # how much larger the prepared weights may be: they are kept beside the plain ones
_TIMES_HALF = 5  # of float16, which the CPU's kernels read as float32
_NAME = "session_cache"
_WEIGHTS = "weights.data"
_RECORD = "prepared.json"
_SAVING = {
    "session.optimized_model_external_initializers_file_name": _WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}


class PreparedGraphs:
    """The prepared graphs of one bundle, made when first needed.

    Args:
        bundle: the bundle; its graphs are checked against their hashes before they come here.
        folder: where those of all bundles are; ``None``: the user's cache.
        limit: bytes of all bundles' together.
    """

    def __init__(self, bundle: Bundle, folder: Path | None = None, limit: int = LIMIT) -> None:
        self._bundle = bundle
        self._folder = user_folder() if folder is None else folder
        self._limit = limit
        self._files = bundle.manifest.files
        size = self._files[DATA_FILE].bytes if DATA_FILE in self._files else 0
        self._size = size
        self._times = _TIMES_HALF if bundle.manifest.half else _TIMES

    @property
    def worth(self) -> bool:
        """Whether graphs are kept: small ones open in no time, too large ones find no room."""
        return self._size >= _WORTH and self._size * self._times <= self._limit

    def open(self, graph: Path, start: Start, form: Form = AS_IT_IS) -> Any:
        """A session on a graph, prepared where that is worth it and the disk has room.

        Args:
            graph: a graph of the bundle whose weights are in its data file.
            start: opens it.
            form: in which form.

        Raises:
            BundleError: the graph cannot be loaded.
        """
        name = graph.relative_to(self._bundle.directory).as_posix()
        try:
            ready = self._ready(name, form.name) or self._prepare(name, form, graph, start)
        except OSError as error:
            warnings.warn(
                f"{self._folder} keeps no prepared graph: {error.strerror or error}", stacklevel=2
            )
            ready = None
        if ready is None:
            return start(_source(graph, form), {}, None)
        try:
            session = start(ready, {}, None)
            trim()  # what packing took, where it was made just now
            return session
        except BundleError:  # a file that is what it was, and that ONNX Runtime does not take
            shutil.rmtree(self._own, ignore_errors=True)
            return start(_source(graph, form), {}, None)

    def checked(self, name: str, form: str = "") -> bool:
        """Whether what a prepared graph gives was compared with another graph's, and was right."""
        return bool(self._entry(name, form).get("checked"))

    def mark_checked(self, name: str, form: str = "") -> None:
        """Note that it was; there is nothing to note where the graph is not kept."""
        entry = self._entry(name, form)
        if entry:
            self._note(name, form, {**entry, "checked": True})

    @cached_property
    def _own(self) -> Path:
        """The folder of this bundle's weights, this processor and this ONNX Runtime."""
        import hashlib  # takes milliseconds, which importing the runtime has no need of

        key = "\n".join(
            [ort.__version__, ort.get_build_info(), processor(), self._files[DATA_FILE].sha256]
        )
        return self._folder / hashlib.sha256(key.encode()).hexdigest()[:24]

    def _key(self, name: str, form: str) -> str:
        return " ".join([name, self._files[name].sha256, *([form] if form else [])])

    def _record(self) -> dict[str, Any]:
        file = self._own / _RECORD
        if not file.is_file():
            return {}
        try:
            return read_object(file, BundleError, "It is made again.")
        except BundleError:  # another release's, or cut off
            return {}

    def _entry(self, name: str, form: str) -> dict[str, Any]:
        entry = self._record().get(self._key(name, form))
        return entry if isinstance(entry, dict) else {}

    def _note(self, name: str, form: str, entry: Mapping[str, Any]) -> None:
        record = {**self._record(), self._key(name, form): dict(entry)}
        write_atomically(self._own / _RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")

    def _ready(self, name: str, form: str) -> Path | None:
        """The prepared graph, if it is there; what is not what was written goes, with all else."""
        entry = self._entry(name, form)
        if not entry:
            return None
        path = self._own / str(entry.get("file"))
        if entry != {**self._facts(path), "checked": bool(entry.get("checked"))}:
            shutil.rmtree(self._own, ignore_errors=True)
            return None
        os.utime(self._own / _RECORD)  # it was used
        return path

    def _facts(self, path: Path) -> dict[str, Any]:
        weights = path.parent / _WEIGHTS
        if not path.is_file() or not weights.is_file():
            return {}
        return {
            "file": path.relative_to(self._own).as_posix(),
            "sha256": hash_file(path),
            "weights": sample_file(weights),
        }

    def _prepare(self, name: str, form: Form, graph: Path, start: Start) -> Path | None:
        """Make it; None where the disk has no room, or this ONNX Runtime does not save weights."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._folder).free < self._size * (self._times + 1):
            return None
        own = self._own
        with tempfile.TemporaryDirectory(prefix=".making-", dir=self._folder) as made:
            # Bundles of one base have the same weights, and graphs of their own.
            told = "-".join(filter(None, [graph.stem, form.name, self._files[name].sha256[:16]]))
            new = Path(made) / f"{told}.onnx"
            # The session itself packed its own copy, and is let go.
            start(_source(graph, form), _SAVING, new)
            if not (new.parent / _WEIGHTS).is_file():
                return None
            own.mkdir(exist_ok=True)
            # A graph's layout of the same weights may be another; it is kept apart, for all alike.
            layouts = [x for x in (own / _WEIGHTS, *own.glob(f"*/{_WEIGHTS}")) if x.is_file()]
            made_weights = new.parent / _WEIGHTS
            alike = [x for x in layouts if filecmp.cmp(x, made_weights, shallow=False)]
            if alike:
                own = alike[0].parent
            else:
                own = own / new.stem if layouts else own
                own.mkdir(exist_ok=True)
                os.replace(made_weights, own / _WEIGHTS)
            os.replace(new, own / new.name)
        path = own / new.name
        self._note(name, form.name, {**self._facts(path), "checked": False})
        self._prune()
        return path

    def _prune(self) -> None:
        """Remove what was longest not used, until all fit; what is being made stays."""
        kept = {
            record.parent: (record.stat().st_mtime, _bytes(record.parent))
            for record in self._folder.glob(f"*/{_RECORD}")
        }
        total = sum(size for _, size in kept.values())
        for folder, (_, size) in sorted(kept.items(), key=lambda item: item[1][0]):
            if total <= self._limit or folder == self._own:
                break
            shutil.rmtree(folder, ignore_errors=True)  # an open one stays, on Windows
            total -= size


def prepared_graphs(bundle: Bundle, where: bool | str | os.PathLike[str]) -> PreparedGraphs | None:
    """The prepared graphs of a bundle; None where they are not wanted, or not worth it.

    Args:
        bundle: the bundle.
        where: a folder; True: the user's cache; False: they are not wanted.

    Raises:
        OptionError: it is none of these.
    """
    if where is False:
        return None
    graphs = PreparedGraphs(bundle, None if where is True else Path(opt.path(_NAME, where)))
    return graphs if graphs.worth else None


def _source(graph: Path, form: Form) -> Path | bytes:
    return form.rewrite(graph.read_bytes()) if form.name else graph


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def user_folder() -> Path:
    """The user's cache folder; ``LORA_EDGE_CACHE`` names another."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given) / "sessions"
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "lora-edge" / "sessions"


def processor() -> str:
    """What tells one kind of processor from another: its name, and its instructions if known."""
    told = [platform.machine(), platform.processor()]
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        told.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    about = Path("/proc/cpuinfo")
    if about.is_file():
        wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
        lines = about.read_text(encoding="utf-8", errors="replace").splitlines()
        told += sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join(told)
