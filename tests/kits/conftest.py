"""Bundles that tests of several kinds of kits use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lora_edge
from tests.support.saving import copy_tokenizer
from tests.support.shipped import ADAPTERS, BASE


@pytest.fixture(scope="session")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose adapter shout brings a tokenizer that ends a text with an exclamation mark.

    Not to be changed.
    """
    root = tmp_path_factory.mktemp("ending")
    shout = Path(shutil.copytree(ADAPTERS["shout"], root / "shout"))
    copy_tokenizer(shout)
    config = json.loads((shout / "tokenizer_config.json").read_text())
    (shout / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "!"}))
    lora_edge.export(BASE, {"shout": shout, "echo": ADAPTERS["echo"]}, output=root / "bundle")
    return root / "bundle"
