"""Paths that files name stay in their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_edge.errors import BundleError
from lora_edge.files.paths import path_inside


def _inside(directory: Path, relative: object) -> Path:
    return path_inside(directory, relative, "manifest: file", BundleError, "Copy it again.")


def test_takes_what_is_inside(tmp_path: Path) -> None:
    (tmp_path / "b" / "real").mkdir(parents=True)
    (tmp_path / "b" / "link").symlink_to("real")
    for relative in ("x", "real/x", "link/x", "a b/é.json", "..x/x..", "adapters/con/a.bin"):
        assert _inside(tmp_path / "b", relative) == tmp_path / "b" / relative


@pytest.mark.parametrize(
    "relative",
    ["/etc/passwd", "../x", "a/../../x", "a/..", "..", ".", "", "a//b", "C:x", "C:\\x", "a\\..\\x",
     "x\0", None, 3, ["x"]],
)  # fmt: skip
def test_refuses_what_leads_out_by_its_name(tmp_path: Path, relative: object) -> None:
    with pytest.raises(BundleError, match="manifest: file is"):
        _inside(tmp_path, relative)


def test_refuses_what_leads_out_by_a_link(tmp_path: Path) -> None:
    bundle, other = tmp_path / "bundle", tmp_path / "bundle-2"
    for folder in (bundle, other):
        folder.mkdir()
    (other / "x").write_text("x")
    (bundle / "adapters").symlink_to(other)
    (bundle / "file").symlink_to(other / "x")
    (bundle / "dangling").symlink_to(tmp_path / "nothing")
    (bundle / "loop").symlink_to("loop")
    for relative in ("adapters/x", "file", "dangling", "adapters/deeper/x"):
        with pytest.raises(BundleError, match="leads out of"):
            _inside(bundle, relative)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert _inside(tmp_path / "link", "x") == tmp_path / "link" / "x"


def test_takes_a_snapshot_of_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    for folder in (snapshot / "onnx", repository / "blobs", repository / "other"):
        folder.mkdir(parents=True)
    (snapshot / "onnx" / "model.onnx").symlink_to("../../../blobs/0123")
    assert _inside(snapshot, "onnx/model.onnx") == snapshot / "onnx/model.onnx"
    (snapshot / "x").symlink_to(repository / "other" / "x")
    with pytest.raises(BundleError, match="leads out of"):
        _inside(snapshot, "x")
