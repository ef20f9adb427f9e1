"""Weights that were changed without changing their size are refused before they answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lora_edge.bundle.bundle import DATA_FILE, Bundle, file_entry, load_bundle
from lora_edge.cli.run import command as run
from lora_edge.errors import BundleError
from lora_edge.files.sample import SMALL
from lora_edge.runtime import Runner


def _with_weights(tiny: Any, folder: Path, size: int) -> Bundle:
    """A bundle with weights of that many bytes beside its graph."""
    bundle: Bundle = tiny.bundle(folder, "fused")
    (folder / DATA_FILE).write_bytes(bytes(size))
    files = {**bundle.manifest.files, DATA_FILE: file_entry(folder / DATA_FILE)}
    return bundle.write_manifest(dataclasses.replace(bundle.manifest, files=files))


def _flip(bundle: Bundle, start: int, count: int) -> None:
    with (bundle.directory / DATA_FILE).open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\xff" * count)


def test_flipped_bytes_of_large_weights_are_seen_by_default(tiny: Any, tmp_path: Path) -> None:
    bundle = _with_weights(tiny, tmp_path / "b", SMALL + 1)
    Runner(bundle.directory, threads=1)
    _flip(bundle, 5_000_001, 100_000)
    with pytest.raises(BundleError, match=r"model\.onnx_data differs from its sampled hash"):
        Runner(bundle.directory, threads=1)


def test_one_byte_is_seen_in_small_weights_and_by_full(tiny: Any, tmp_path: Path) -> None:
    small = _with_weights(tiny, tmp_path / "small", 100_000)
    _flip(small, 50_001, 1)
    with pytest.raises(BundleError, match=r"model\.onnx_data differs from its hash"):
        Runner(small, threads=1)
    large = _with_weights(tiny, tmp_path / "large", SMALL + 1)
    _flip(large, 5000, 1)
    Runner(large, threads=1)  # between two samples, as docs/security.md says
    with pytest.raises(BundleError, match=r"model\.onnx_data differs from its hash"):
        Runner(large, threads=1, verify="full")
    given = [str(large.directory), "-p", "a", "--verify", "full"]
    done = CliRunner().invoke(run, given)
    assert isinstance(done.exception, BundleError)


def test_full_looks_at_files_that_are_not_used_yet(tiny: Any, tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path / "b", "fused")
    file = tmp_path / "b" / bundle.adapter("alpha").file
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    Runner(bundle, threads=1)
    with pytest.raises(BundleError, match="alpha"):
        Runner(bundle, threads=1, verify="full")


def test_bundles_from_before_have_no_sample_and_open(tiny: Any, tmp_path: Path) -> None:
    bundle = _with_weights(tiny, tmp_path / "b", SMALL + 1)
    text = (bundle.directory / "lora_edge.json").read_text()
    old = [line for line in text.splitlines() if '"sample"' not in line]
    (bundle.directory / "lora_edge.json").write_text("\n".join(old))
    again = load_bundle(bundle.directory)
    assert all(entry.sample is None for entry in again.manifest.files.values())
    Runner(again, threads=1)
    _flip(bundle, 0, 8)
    with pytest.raises(BundleError, match="differs from its hash"):
        Runner(again, threads=1, verify="full")
