"""The export folder: its layout, its manifest, content hashes.

Knows files; knows nothing of graphs, adapters' maths or runtimes. The layout is::

    DIR/
      lora_edge.json                         the manifest, with a hash of every file
      onnx/model.onnx, onnx/model.onnx_data  (of an encoder-decoder: encoder_model, decoder_model)
      onnx/base.onnx                         the same graph without branches, on the same data
      onnx/exact.onnx                        of few bits, fp16: the graph in float32, the same data
      onnx/{encoder,decoder}_exact.onnx      the same of an encoder-decoder of few bits
      onnx/static.onnx                       the decoder with fixed shapes, on the same data
      adapters/NAME/adapter.onnx_adapter     for the runtime
      adapters/NAME/half.onnx_adapter        of fp16: the same in float16, for other runtimes
      adapters/NAME/peft/                    the PEFT files, verbatim: what parity is proved against
      parity/                                golden cases and the report of the export's own check
      config.json, tokenizer.json, ...       copied from the base model
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lora_edge.bundle.manifest import (
    MANIFEST_NAME,
    AdapterEntry,
    FileEntry,
    Manifest,
)
from lora_edge.errors import AdapterNotFoundError, BundleError
from lora_edge.files.hashes import hash_file, read_hashed
from lora_edge.files.json import read_bytes
from lora_edge.files.paths import path_inside
from lora_edge.files.sample import SMALL, sample_file
from lora_edge.types import path as checked_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The manifest's types can be had here too.
__all__ = [
    "BASE_GRAPH_FILE",
    "DATA_FILE",
    "DECODER_FILE",
    "ENCODER_FILE",
    "EXACT_GRAPH_FILE",
    "GRAPH_FILE",
    "MANIFEST_NAME",
    "ROWS_GRAPH_FILE",
    "SINGLE_GRAPH_FILE",
    "STATIC_GRAPH_FILE",
    "AdapterEntry",
    "Bundle",
    "FileEntry",
    "Manifest",
    "exact_file",
    "file_entries",
    "file_entry",
    "hash_file",
    "load_bundle",
]

GRAPH_FILE = "onnx/model.onnx"
DATA_FILE = "onnx/model.onnx_data"
BASE_GRAPH_FILE = "onnx/base.onnx"  # the decoder without branches, on the same data file
SINGLE_GRAPH_FILE = "onnx/single.onnx"  # with branches for one adapter, without gates
ROWS_GRAPH_FILE = "onnx/rows.onnx"  # with branches whose A and B each row has of its own
EXACT_GRAPH_FILE = "onnx/exact.onnx"  # the model in floats, on the same data file
STATIC_GRAPH_FILE = "onnx/static.onnx"  # the decoder with fixed shapes, on the same data file
ENCODER_FILE = "onnx/encoder_model.onnx"
DECODER_FILE = "onnx/decoder_model.onnx"


def exact_file(graph: str) -> str:
    """Of a graph's file, the one of the same graph in floats, on the same data file."""
    return graph.replace("model.onnx", "exact.onnx")


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: its folder and its manifest."""

    directory: Path
    manifest: Manifest

    def adapter(self, name: str) -> AdapterEntry:
        """The entry of an adapter.

        Raises:
            AdapterNotFoundError: the bundle has no adapter of that name.
        """
        entry = self.manifest.adapters.get(name)
        if entry is None:
            known = ", ".join(sorted(self.manifest.adapters)) or "none at all"
            raise AdapterNotFoundError(
                f"the bundle has no adapter {name!r}; it has {known}",
                f"Add it with: lora-edge add {self.directory} -a {name}=PEFT_DIRECTORY",
            )
        return entry

    def path(self, relative: str) -> Path:
        """The path of a file of the bundle, which need not exist.

        Raises:
            BundleError: it lies outside of the bundle, by its name or by a link.
        """
        return path_inside(
            self.directory,
            relative,
            f"{self.directory}: a file of the bundle",
            BundleError,
            "Copy the whole bundle folder again, links as the files that they lead to.",
        )

    def verify(self, relative: str) -> Path:
        """Check one file against its hash and return its path.

        Raises:
            BundleError: the file is missing, lies outside, or differs from the manifest.
        """
        path, entry = self._sized(relative)
        if hash_file(path) != entry.sha256:
            raise self._changed(relative)
        return path

    def read(self, relative: str) -> NDArray[np.uint8]:
        """The content of one file, checked against its hash as it is read.

        Returns:
            ``[bytes] uint8``, in memory of its own: what was checked is what is returned.

        Raises:
            BundleError: as :meth:`verify`, or the file cannot be read.
        """
        path, entry = self._sized(relative)
        try:
            content, digest = read_hashed(path, entry.bytes)
        except OSError as error:
            raise BundleError(
                f"{path} cannot be read: {error.strerror}", "Copy the bundle again."
            ) from error
        if digest != entry.sha256:
            raise self._changed(relative)
        return content

    def _sized(self, relative: str) -> tuple[Path, FileEntry]:
        """The path and the entry of a file that is there and as long as it should be."""
        path = self.path(relative)
        entry = self.manifest.files.get(relative)
        if entry is None or not path.is_file():
            raise BundleError(
                f"{self.directory}: {relative} is missing", "Copy the whole bundle folder again."
            )
        if path.stat().st_size != entry.bytes:
            raise self._changed(relative)
        return path, entry

    def _changed(self, relative: str) -> BundleError:
        return BundleError(
            f"{self.directory}: {relative} differs from its hash in {MANIFEST_NAME}",
            "The file was changed or cut off; copy the bundle again, or export it again.",
        )

    def verify_sample(self, relative: str) -> Path:
        """Check a large file by its size and some of its blocks, a small one as :meth:`verify`.

        Raises:
            BundleError: the file is missing, lies outside, or differs from the manifest.
        """
        path = self.path(relative)
        entry = self.manifest.files.get(relative)
        size = path.stat().st_size if path.is_file() else None
        if entry is None:
            return self.verify(relative)
        if size != entry.bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise BundleError(
                f"{self.directory}: {relative} is {found}, expected {entry.bytes} bytes",
                "The copy was cut off; copy the whole bundle folder again.",
            )
        if entry.bytes <= SMALL:
            return self.verify(relative)
        if entry.sample is not None and sample_file(path) != entry.sample:
            raise BundleError(
                f"{self.directory}: {relative} differs from its sampled hash in {MANIFEST_NAME}",
                "The file was changed or damaged; copy the bundle again, or export it again.",
            )
        return path

    def verify_all(self) -> None:
        """Check every file of the bundle against its hash.

        Raises:
            BundleError: a file is missing or differs from the manifest.
        """
        for relative in self.manifest.files:
            self.verify(relative)

    def write_manifest(self, manifest: Manifest) -> Bundle:
        """Replace the manifest atomically and return the bundle that it describes.

        For a folder that nobody else knows of; a published bundle is changed by :meth:`change`.
        """
        from lora_edge.files.transaction import write_atomically

        write_atomically(self.directory / MANIFEST_NAME, _readable(manifest))
        return Bundle(self.directory, manifest)

    def change(self, prepared: Path, edit: Callable[[Manifest], Manifest]) -> Bundle:
        """Change the bundle in one step, whoever else has changed it since it was opened.

        Args:
            prepared: a folder of :func:`~lora_edge.files.changing.preparing`, with the files
                that are new.
            edit: the manifest as it is now, read under the bundle's lock -> the new one. Files
                that only the new one names are put in place, those that only the old one names go.

        Raises:
            BundleError: another process holds the bundle, or has replaced it.
        """
        from lora_edge.files.changing import writing

        with writing(self.directory) as lock:
            now = load_bundle(self.directory).manifest
            made = edit(now)
            if not prepared.is_dir():
                raise self.replaced()
            lock.commit(
                prepared,
                sorted(made.files.keys() - now.files.keys()),
                MANIFEST_NAME,
                _readable(made).encode(),
                sorted(now.files.keys() - made.files.keys()),
            )
        return Bundle(self.directory, made)

    def replaced(self) -> BundleError:
        """The error of a change that was prepared for a bundle that is there no more."""
        return BundleError(
            f"{self.directory} was replaced by another bundle meanwhile; nothing was changed",
            "Call the command again, for the bundle that is there now.",
        )

    def check_graph(self, now: Manifest) -> None:
        """Check that a manifest that was read again is of the same graph and weights.

        Raises:
            BundleError: it is not: the bundle was replaced.
        """
        then = self.manifest
        facts = ("mode", "task", "base", "parts", "uncovered", "tied", "quantization", "beginning")
        changed = any(getattr(then, name) != getattr(now, name) for name in facts)
        graphs = [{k: v for k, v in x.files.items() if k.startswith("onnx/")} for x in (then, now)]
        if changed or graphs[0] != graphs[1]:
            raise self.replaced()


def _readable(manifest: Manifest) -> str:
    text = manifest.to_json()
    Manifest.from_json(text)  # nothing is published that could not be read
    return text


def load_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Open a bundle folder. Reads the manifest only; files are verified when they are used.

    Raises:
        BundleError: the folder is missing or is not a bundle, or a link leads out of it.
    """
    root = Path(checked_path("bundle", directory))
    manifest = root / MANIFEST_NAME
    if not manifest.is_file():
        from lora_edge.bundle.package import is_package  # which reads bundles

        if is_package(root):
            raise BundleError(
                f"{root} is a model package, and no bundle",
                f"Check it with: lora-edge package --check {root}",
            )
        what = "does not exist" if not root.exists() else f"has no {MANIFEST_NAME}"
        raise BundleError(
            f"{root} is not a bundle: it {what}", "Make one with: lora-edge export BASE -o DIR"
        )
    data = read_bytes(manifest, BundleError, "Copy the whole bundle folder again.")
    bundle = Bundle(root, Manifest.from_json(data, str(manifest)))
    _check_links(bundle)
    return bundle


def _check_links(bundle: Bundle) -> None:
    """No link of the bundle leads out of it: neither what is read there nor what is written."""
    folders = {parent for name in bundle.manifest.files for parent in PurePosixPath(name).parents}
    for folder in {*folders, PurePosixPath("adapters"), PurePosixPath("parity")}:
        if folder != PurePosixPath():
            bundle.path(str(folder))
    for name in bundle.manifest.files:
        if (bundle.directory / name).is_symlink():
            bundle.path(name)


def file_entry(path: Path) -> FileEntry:
    """The manifest's entry of one file."""
    size = path.stat().st_size
    return FileEntry(hash_file(path), size, sample_file(path) if size > SMALL else None)


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """Hash every file below a folder except the manifest, by relative path."""
    from lora_edge.files.hidden import is_hidden

    return {
        path.relative_to(directory).as_posix(): file_entry(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name != MANIFEST_NAME
        and not any(map(is_hidden, path.relative_to(directory).parts))
    }
