"""The exports of the models that ship are what they were, to the bit: graphs, weights, adapters.

What a machine rounds by itself (tables of cosines, merged weights) is compared by name, dtype
and shape; the export proves its values. After a change that is meant to change the graph::

    python -m tests.exporting.test_same_graph > tests/exporting/same_graph.json
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.numpy import load_file

import lora_edge
from lora_edge.graph.contents import contents
from tests.support.examples import examples
from tests.support.shipped import ADAPTERS, BASE, BERT, CLASSIFIERS

PINS = Path(__file__).with_name("same_graph.json")
EXPORTS: Mapping[str, tuple[Path, Mapping[str, Path], Mapping[str, Any]]] = {
    "switchable": (BASE, ADAPTERS, {}),
    "portable": (BASE, ADAPTERS, {"form": "portable"}),
    "merged": (BASE, {"echo": ADAPTERS["echo"]}, {"mode": "merged"}),
    "int4": (BASE, ADAPTERS, {"precision": "int4"}),
    "classifiers": (BERT, CLASSIFIERS, {}),
}
# Of the machine, the day or the packages, not of the code.
_VARYING = ("base_check", "versions", "files")


def facts(name: str, folder: Path) -> dict[str, str]:
    """What an export is to be the same in: a hash for each of its files, and for its manifest."""
    base, adapters, options = EXPORTS[name]
    bundle = lora_edge.export(base, adapters, output=folder, **options).directory
    parameters = load_file(base / "model.safetensors")
    found = {}
    for path in sorted(bundle.rglob("*")):
        relative = path.relative_to(bundle).as_posix()
        if path.suffix == ".onnx":
            found[relative] = _hash(onnx.load(path, load_external_data=False).SerializeToString())
            constants = []
            for content in contents(path):
                values = content.values()
                known = options.get("mode") != "merged" and content.name.split(".weight")[0]
                exact = known and (f"{known}.weight" in parameters or content.name in parameters)
                said = values.tobytes() if exact else f"{values.dtype} {values.shape}".encode()
                constants.append(f"{content.name} {_hash(said)}")
            found[f"{relative} constants"] = _hash("\n".join(sorted(constants)).encode())
        elif path.is_file() and (path.suffix == ".onnx_adapter" or "peft" in path.parts):
            found[relative] = _hash(path.read_bytes())
    manifest = json.loads((bundle / "lora_edge.json").read_text(encoding="utf-8"))
    manifest["base"]["name_or_path"] = ""
    for figure in ("mean_error", "worst_error") if manifest["quantization"] else ():
        # A sum over a layer: its last digits are the machine's.
        manifest["quantization"][figure] = round(manifest["quantization"][figure], 6)
    told = {key: value for key, value in manifest.items() if key not in _VARYING}
    found["lora_edge.json"] = _hash(json.dumps(told, sort_keys=True).encode())
    found["files"] = _hash("\n".join(sorted(x.split("-")[0] for x in manifest["files"])).encode())
    return found


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("name", examples(EXPORTS, ["switchable", "int4", "classifiers"]))
def test_an_export_is_what_it_was(name: str, tmp_path: Path) -> None:
    pinned = json.loads(PINS.read_text(encoding="utf-8"))[name]
    found = facts(name, tmp_path / "out")
    changed = {key for key in {*pinned, *found} if pinned.get(key) != found.get(key)}
    assert not changed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made = {name: facts(name, Path(scratch) / name) for name in EXPORTS}
    print(json.dumps(made, indent=1, sort_keys=True))
