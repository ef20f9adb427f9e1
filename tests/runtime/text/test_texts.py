"""A row is read by its own adapter's tokenizer and chat template, whatever its neighbours have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers

from lora_edge.bundle.bundle import file_entries, load_bundle
from lora_edge.errors import AdapterNotFoundError, BundleError, DataError
from lora_edge.runtime import Runner
from lora_edge.runtime.outputs.outputs import Outputs

NEW = 260  # the id of the adapter's own token


def _bring(tiny: Any, directory: Path, brought: dict[str, dict[str, str]], **options: Any) -> Path:
    """A bundle whose adapters bring files: name -> file -> text."""
    bundle = tiny.bundle(directory, "fused", **options)
    entries = dict(bundle.manifest.adapters)
    for name, files in brought.items():
        folder = directory / "adapters" / name / "text"
        if bundle.manifest.mode == "merged":
            folder = directory
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text)
        aspects = {"tokenizer" if x.endswith(".json") else "chat_template" for x in files}
        entries[name] = dataclasses.replace(entries[name], text=tuple(sorted(aspects)[::-1]))
    manifest = dataclasses.replace(bundle.manifest, adapters=entries, files=file_entries(directory))
    bundle.write_manifest(manifest)
    return directory


@pytest.fixture
def own(tiny: Any, tmp_path: Path) -> dict[str, str]:
    """A tokenizer with one more token, which ends what its adapter says."""
    plain = tiny.bundle(tmp_path / "plain", "fused").directory
    made = tokenizers.Tokenizer.from_file(str(plain / "tokenizer.json"))
    made.add_special_tokens(["<|im_end|>"])
    assert made.token_to_id("<|im_end|>") == NEW
    config = json.dumps({"bos_token": "<bos>", "eos_token": "<|im_end|>"})
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": config}


TEMPLATE = {"chat_template.jinja": "[{{ messages[-1].content }}]{{ eos_token }}"}


@pytest.fixture
def runner(tiny: Any, tmp_path: Path, own: dict[str, str]) -> Runner:
    brought = {"alpha": own, "beta": TEMPLATE}
    return Runner(load_bundle(_bring(tiny, tmp_path / "model", brought)))


def test_each_adapter_has_its_own(runner: Runner) -> None:
    text = "a<|im_end|>"
    assert len(runner.tokenizer.encode(text)) == 12
    assert runner.tokenizer_of("alpha").encode(text)[-1] == NEW
    for base in (None, "none", "beta", "readout", {"readout": 0.5}):
        assert runner.tokenizer_of(base).encode(text) == runner.tokenizer.encode(text)
    assert runner.tokenizer_of("beta").chat_text("x") == "[x]<eos>"
    assert runner.tokenizer_of("alpha").chat_text("x") == "<bos><user>x<assistant>"
    assert runner.tokenizer_of({"alpha": 0.3}) is runner.tokenizer_of("alpha")
    with pytest.raises(AdapterNotFoundError):
        runner.tokenizer_of("nobody")


def test_an_adapters_own_end_token_ends_its_rows(runner: Runner, tiny: Any) -> None:
    assert runner.eos_of(None) == runner.eos_of("beta") == runner.eos_ids == {tiny.eos}
    assert runner.eos_of("alpha") == {tiny.eos, NEW}


def test_a_mixed_batch_reads_each_row_by_its_own(runner: Runner) -> None:
    prompts = ["hi<|im_end|>", "hi<|im_end|>", "hi<|im_end|>", "ho"]
    states: list[Any] = ["alpha", None, "beta", {"readout": 0.5}]
    for options in ({}, {"chat": True}):
        together = runner.generate(prompts, states, 6, **options)
        alone = [
            runner.generate(x, a, 6, **options)[0] for x, a in zip(prompts, states, strict=True)
        ]
        assert together == alone
    ids = [runner.tokenizer_of(a).encode(x) for x, a in zip(prompts, states, strict=True)]
    assert len(ids[0]) < len(ids[1])
    own = runner.generate_ids(ids, states, 6)
    read = [runner.tokenizer_of(a).decode(row) for a, row in zip(states, own, strict=True)]
    assert runner.generate(prompts, states, 6) == read


def test_blends_have_a_tokenizer_only_where_all_agree(
    tiny: Any, tmp_path: Path, own: dict[str, str], runner: Runner
) -> None:
    blend = {"alpha": 0.5, "beta": 0.5}
    with pytest.raises(DataError, match="alpha, beta do not share one tokenizer"):
        runner.generate("hi", blend, 4)
    with pytest.raises(DataError, match="do not share one tokenizer and chat template"):
        runner.tokenizer_of({"beta": 0.5, "readout": 0.5})
    # Without a template they read alike; and ids need no tokenizer.
    assert runner.generate("hi", {"beta": 0.5, "readout": 0.5}, 4)
    assert runner.generate_ids([[1, 2]], blend, 4)
    with pytest.raises(DataError, match="chat template"):
        runner.generate("hi", {"beta": 0.5, "readout": 0.5}, 4, chat=True)
    both = _bring(
        tiny, tmp_path / "both", {"alpha": {**own, **TEMPLATE}, "beta": {**own, **TEMPLATE}}
    )
    agreed = Runner(load_bundle(both))
    assert agreed.tokenizer_of(blend).encode("<|im_end|>") == [257, NEW]
    assert agreed.eos_of(blend) == {tiny.eos, NEW}
    assert agreed.generate("hi", blend, 4, chat=True)


def test_a_merged_bundle_has_its_adapters(tiny: Any, tmp_path: Path, own: dict[str, str]) -> None:
    brought = {"alpha": {**own, **TEMPLATE}}
    made = Runner(load_bundle(_bring(tiny, tmp_path / "m", brought, mode="merged")))
    for adapter in (None, "alpha"):
        assert made.tokenizer_of(adapter).encode("<|im_end|>") == [257, NEW]
        assert made.eos_of(adapter) == {tiny.eos, NEW}
    assert made.tokenizer.chat_text("x") == "[x]<|im_end|>"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_an_adapters_files_are_checked(file: str, runner: Runner) -> None:
    path = runner.bundle.directory / "adapters" / "alpha" / "text" / file
    path.write_text(path.read_text().replace("im_end", "im_END"))
    with pytest.raises(BundleError, match="differs from its hash"):
        runner.tokenizer_of("alpha")
    assert runner.tokenizer_of("beta").chat_text("x") == "[x]<eos>"


@pytest.mark.parametrize("given", [["tokenizer", 7], ["nothing"], "tokenizer", None])
def test_what_the_manifest_says_of_it_has_a_schema(given: Any, runner: Runner) -> None:
    path = runner.bundle.directory / "lora_edge.json"
    data = json.loads(path.read_text())
    data["adapters"]["alpha"]["text"] = given
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="text"):
        load_bundle(runner.bundle.directory)


def test_streams_and_pins_too(tiny: Any, tmp_path: Path, own: dict[str, str]) -> None:
    make: Callable[..., Path] = _bring
    folder = make(tiny, tmp_path / "model", {"alpha": {**own, **TEMPLATE}})
    plain = Runner(load_bundle(folder))
    text = plain.generate("hi<|im_end|>", "alpha", 6, chat=True)[0]
    assert "".join(plain.stream("hi<|im_end|>", "alpha", 6, chat=True)) == text


@pytest.mark.parametrize(
    "file",
    [
        "special_tokens_map.json",
        "additional_chat_templates/tool_use.jinja",
        "adapters/beta/text/tokenizer.json",
        "adapters/alpha/text/chat_template.jinja",
        "adapters/alpha/text/additional_chat_templates/x.jinja",
    ],
)
def test_a_file_that_the_manifest_does_not_list_is_not_read(file: str, runner: Runner) -> None:
    path = runner.bundle.directory / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(BundleError, match=f"{file} is not in the manifest"):
        _ = [runner.tokenizer_of(name).templates for name in (None, "alpha", "beta")]


def test_outputs_of_encoders_read_each_text_by_its_own(runner: Runner) -> None:
    encoder: Any = SimpleNamespace(part=SimpleNamespace(max_length=96))
    outputs = Outputs(
        runner.bundle, encoder, lambda state: runner.tokenizer_of(dict(state) or None)
    )
    text = "a<|im_end|>"
    found = outputs.encode([text] * 3, states=[(("alpha", 1.0),), (), (("readout", 1.0),)])
    assert [len(one.ids) for one in found] == [3, 12, 12]
    assert [len(one.ids) for one in outputs.encode([text] * 2)] == [12, 12]
