"""Adapters that bring a tokenizer or a chat template: exported, added, merged, inspected, run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lora_edge
from lora_edge.cli import main
from lora_edge.errors import AdapterError
from tests.support.shipped import ADAPTERS, BASE

TEMPLATE = "{% if tools is not none %}TOOLS {% endif %}<|user|>{{ messages[-1].content }}!"


def _theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped adapters: echo with a tokenizer of its own, shout with a template of its own."""
    root = tmp_path_factory.mktemp("adapters")
    folders = {name: Path(shutil.copytree(ADAPTERS[name], root / name)) for name in ADAPTERS}
    _theirs(BASE).save_pretrained(folders["echo"])
    path = folders["echo"] / "tokenizer.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "normalizer": {"type": "Lowercase"}}))
    (folders["shout"] / "chat_template.jinja").write_text(TEMPLATE)
    _theirs(BASE).save_pretrained(folders["mirror"])  # the base's, as every trainer writes it
    return folders


@pytest.fixture(scope="module")
def bundle(brought: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "out"
    said: list[str] = []
    two = {name: brought[name] for name in ("echo", "mirror")}
    lora_edge.export(BASE, two, output=output, progress=said.append)
    assert any("echo brings its own tokenizer" in line for line in said)
    assert not any("mirror brings" in line for line in said)
    lora_edge.add(output, {"shout": brought["shout"]})
    return output


def test_each_row_is_read_as_transformers_reads_it(bundle: Path, brought: dict[str, Path]) -> None:
    runner = lora_edge.Runner(bundle)
    messages = [{"role": "user", "content": "lemon"}]
    for name in ("echo", "mirror", "shout"):
        theirs = _theirs(BASE if name == "shout" else brought[name])
        theirs.chat_template = TEMPLATE if name == "shout" else theirs.chat_template
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        ours = runner.tokenizer_of(name)
        assert ours.encode_chat(messages) == expected
        for text in (
            "Word: river Answer:",
            "<|user|>lemon<|end|>",
            "".join(sorted(ours.vocabulary())),
        ):
            assert ours.encode(text) == theirs(text)["input_ids"]
    upper = [runner.tokenizer_of(x).encode("RIVER") for x in ("echo", "mirror")]
    assert upper[0] == runner.tokenizer.encode("river") != upper[1]
    assert runner.tokenizer_of("shout").chat_text("x") == "<|user|>x!"
    prompts = ["LEMON"] * 4
    states: list[Any] = ["echo", "mirror", "shout", None]
    together = runner.generate(prompts, states, 6, chat=True)
    assert together == [runner.generate("LEMON", x, 6, chat=True)[0] for x in states]


def _inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", *map(str, arguments)])
    return capsys.readouterr().out


def test_the_bundle_is_proved_and_says_what_it_carries(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = lora_edge.load_bundle(bundle).manifest.adapters
    assert [entries[x].text for x in ("echo", "mirror", "shout")] == [
        ("tokenizer",), (), ("chat_template",),
    ]  # fmt: skip
    lora_edge.load_bundle(bundle).verify_all()
    shown = _inspected(capsys, bundle)
    assert "has its own tokenizer" in shown
    assert "has its own chat template" in shown


def test_inspect_shows_what_an_adapter_brings(
    brought: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _inspected(capsys, brought["echo"])
    assert "brings" in shown
    assert "tokenizer" in shown
    data = json.loads(_inspected(capsys, brought["shout"], "--json"))
    assert data["text"] == ["chat_template"]


def test_tokens_without_rows_stop_add_and_leave_the_bundle(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ADAPTERS["echo"], tmp_path / "wide"))
    theirs = _theirs(BASE)
    theirs.add_tokens([f"<new{i}>" for i in range(40)])
    theirs.save_pretrained(folder)
    before = {x.relative_to(bundle) for x in bundle.rglob("*")}
    with pytest.raises(AdapterError, match="beyond the base's vocabulary"):
        lora_edge.add(bundle, {"wide": folder})
    assert {x.relative_to(bundle) for x in bundle.rglob("*")} == before
