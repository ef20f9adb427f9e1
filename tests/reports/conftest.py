"""Reports of real validations: one that passed, one that failed, one with something unproved."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_edge
from lora_edge.bundle.bundle import file_entries, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
from tests.support import shipped


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the shipped base with two adapters; not to be changed."""
    return shipped.export_text(tmp_path_factory.mktemp("reports") / "good", "echo", "mirror")


@pytest.fixture(scope="session")
def faulty(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one adapter at twice its scale, its hashes made right again."""
    directory = tmp_path_factory.mktemp("reports") / "faulty"
    shutil.copytree(bundle, directory)
    loaded = load_bundle(directory)
    file = directory / loaded.adapter("mirror").file
    tensors = read_adapter(file)
    doubled = {k: v * np.float32(2 if k.endswith(".B") else 1) for k, v in tensors.items()}
    write_adapter(file, doubled)
    loaded.write_manifest(dataclasses.replace(loaded.manifest, files=file_entries(directory)))
    return directory


@pytest.fixture(scope="session")
def unproved(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an adapter that PyTorch has not seen."""
    directory = tmp_path_factory.mktemp("reports") / "unproved"
    shutil.copytree(bundle, directory)
    lora_edge.add(directory, {"shout": shipped.ADAPTERS["shout"]})
    return directory


@pytest.fixture(scope="session")
def reports(bundle: Path, faulty: Path, unproved: Path) -> dict[str, dict[str, Any]]:
    """The reports by what they are of, as JSON gives them back."""
    levels = ["all", "disable"]
    found = {
        "good": lora_edge.validate(bundle, optimization=levels, depth="quick"),
        "faulty": lora_edge.validate(faulty, optimization=levels, depth="quick"),
        "unproved": lora_edge.validate(unproved, depth="quick"),
    }
    return {name: json.loads(report.to_json()) for name, report in found.items()}
