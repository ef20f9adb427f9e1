"""The verbs at the command line: data to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import click
import pytest

import lora_edge
from lora_edge.bundle.bundle import file_entry
from lora_edge.cli import cli as commands
from tests.support.commands import Cli
from tests.support.paths import MODELS

PROMPT = "Word: river Answer:"


def test_run_prints_the_completion_only(cli: Cli, bundle: Path) -> None:
    runner = lora_edge.Runner(bundle)
    for name in ("echo", "mirror", "shout"):
        result = cli("run", bundle, "-a", name, "-p", PROMPT)
        (completion,) = runner.generate([PROMPT], adapter=name)
        assert (result.code, result.out, result.err) == (0, f"{completion}\n", "")
    assert cli("run", bundle, "-a", "mirror", "-p", PROMPT).out.strip() == "revir"


def test_run_without_an_adapter_is_the_base(cli: Cli, bundle: Path) -> None:
    off = cli("run", bundle, "-p", PROMPT, "--max-new-tokens", 8).out
    assert off == lora_edge.Runner(bundle).generate([PROMPT], max_new_tokens=8)[0] + "\n"
    assert off != cli("run", bundle, "-a", "shout", "-p", PROMPT, "--max-new-tokens", 8).out


def test_an_option_of_one_value_is_given_once(cli: Cli, bundle: Path) -> None:
    given = ("run", bundle, "-p", PROMPT, "--prompt", "another", "--max-new-tokens", 2)
    refused = cli(*given)
    assert (refused.code, refused.out) == (2, "")
    assert "--prompt is given 2 times, expected once" in refused.err
    assert cli("run", bundle, "-p", PROMPT, "--stop", "a", "--stop", "b", "--exact").code == 0


def test_every_verb_refuses_what_is_given_twice(cli: Cli) -> None:
    context = click.Context(commands)
    tried = 0
    for verb in commands.list_commands(context):
        command = commands.get_command(context, verb)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option) and not (option.multiple or option.is_flag):
                name = max(option.opts, key=len)
                refused = cli(verb, name, "1", name, "2")
                assert refused.code == 2
                assert f"{name} is given 2 times, expected once" in refused.err
                tried += 1
    assert tried > 50


def test_run_pins_adapters(cli: Cli, bundle: Path) -> None:
    asked = ("run", bundle, "-a", "mirror", "-p", PROMPT)
    assert cli(*asked, "--pin", "mirror", "--pin", "none") == cli(*asked)
    refused = cli(*asked, "--pin", "nobody")
    assert (refused.code, refused.out) == (2, "")
    assert "no adapter 'nobody'" in refused.err


def test_run_reads_the_prompt_from_stdin(cli: Cli, bundle: Path) -> None:
    piped = cli("run", bundle, "-a", "shout", "-p", "-", stdin=PROMPT)
    assert piped == cli("run", bundle, "-a", "shout", "-p", PROMPT)


def test_run_chat_follows_the_model_and_says_what_it_does_not_follow(
    cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    path = copy / "generation_config.json"
    asked = {"do_sample": True, "temperature": 3.0, "top_k": 9, "num_beams": 4}
    path.write_text(json.dumps({**json.loads(path.read_text()), **asked}))
    manifest = lora_edge.load_bundle(copy).manifest
    files = {**manifest.files, path.name: file_entry(path)}
    lora_edge.load_bundle(copy).write_manifest(dataclasses.replace(manifest, files=files))
    given = ("run", copy, "-a", "echo", "-p", PROMPT, "--chat", "--seed", 5)
    sampled = cli(*given)
    own = {"temperature": 3.0, "top_k": 9, "seed": 5, "chat": True}
    assert sampled.out.rstrip("\n") == lora_edge.Runner(copy).generate(PROMPT, "echo", **own)[0]
    assert sampled.err.splitlines() == [
        "note: the model's generation_config.json says what is not followed: num_beams=4"
    ]
    greedy = cli(*given, "--temperature", 0)
    assert greedy.out == cli("run", bundle, "-a", "echo", "-p", PROMPT, "--chat").out != sampled.out
    assert cli(*given, "--stream") == sampled
    assert cli("run", copy, "-a", "echo", "-p", PROMPT).err == ""  # without --chat nothing is asked


def test_text_that_is_no_unicode_is_a_refusal(cli: Cli, bundle: Path) -> None:
    for options in ((), ("--chat",)):
        refused = cli("run", bundle, "-p", "caf\udce9", *options)
        assert (refused.code, refused.out) == (2, "")
        assert "half of a surrogate pair" in refused.err
        assert len(refused.err.splitlines()) <= 2


def test_run_streams_the_same_text(cli: Cli, bundle: Path) -> None:
    whole = cli("run", bundle, "-a", "echo", "-p", PROMPT)
    assert cli("run", bundle, "-a", "echo", "-p", PROMPT, "--stream") == whole


def test_run_blends(cli: Cli, bundle: Path) -> None:
    blend = {"mirror": 0.6, "shout": 0.4}
    result = cli("run", bundle, *(f"-a{n}={w}" for n, w in blend.items()), "-p", PROMPT, "--json")
    (completion,) = lora_edge.Runner(bundle).generate([PROMPT], adapter=blend)
    assert json.loads(result.out) == {"prompt": PROMPT, "adapter": blend, "completion": completion}


def test_run_takes_an_adapter_for_each_row(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    """Rows without a key get the command's adapter; null is the base."""
    rows = [
        {"prompt": PROMPT, "adapter": "mirror"},
        {"prompt": "Word: lemon Answer:", "adapter": None},
        {"prompt": "Word: stone Answer:", "adapter": {"echo": 0.5, "shout": 0.5}},
        {"prompt": "Word: garden Answer:"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    result = cli("run", bundle, "--input", file, "-a", "shout", "--max-new-tokens", 12)
    assert (result.code, result.err) == (0, "")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    states = ["mirror", None, {"echo": 0.5, "shout": 0.5}, {"shout": 1.0}]
    assert [row["adapter"] for row in found] == states
    runner = lora_edge.Runner(bundle)
    for row, state in zip(found, states, strict=True):
        alone = runner.generate([row["prompt"]], adapter=state, max_new_tokens=12)
        assert [row["completion"]] == alone
    assert len({row["completion"] for row in found}) == 4


def test_run_samples_by_seed_and_stops(cli: Cli, bundle: Path) -> None:
    sampled = ("run", bundle, "-a", "echo", "-p", PROMPT, "--temperature", 3)
    assert cli(*sampled, "--seed", 1) == cli(*sampled, "--seed", 1)
    assert cli(*sampled, "--seed", 1) != cli(*sampled, "--seed", 2)
    whole = cli("run", bundle, "-a", "mirror", "-p", PROMPT).out
    cut = cli("run", bundle, "-a", "mirror", "-p", PROMPT, "--stop", "v").out
    assert cut == whole.partition("v")[0] + "\n" != whole


@pytest.mark.parametrize(
    "arguments", [[], ["-p", "x", "--input", "y"], ["--input", "y", "--stream"]]
)
def test_run_wants_one_source_of_prompts(arguments: list[str], cli: Cli, bundle: Path) -> None:
    result = cli("run", bundle, *arguments)
    assert (result.code, result.out) == (2, "")
    assert "--prompt" in result.err


@pytest.mark.parametrize("choice", ["mirror=x", "mirror=inf", "=1"])
def test_a_weight_that_is_no_number_is_a_usage_error(choice: str, cli: Cli, bundle: Path) -> None:
    result = cli("run", bundle, "-a", choice, "-p", "x")
    assert (result.code, result.out) == (2, "")
    assert choice in result.err


def test_add_leaves_the_adapter_unproved(
    cli: Cli, bundle: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    result = cli("add", copy, "-a", f"again={adapters['mirror']}")
    assert (result.code, result.out) == (0, f"{copy}\n")
    assert "again: unproved" in result.err
    assert re.search(r"again: .*UNPROVED", cli("inspect", copy).out)
    mirror, again = (cli("run", copy, "-a", name, "-p", PROMPT).out for name in ("mirror", "again"))
    assert mirror == again
    report = cli("validate", copy)
    assert report.code == 1
    assert "unproved: adapter again" in report.out
    same = cli("add", copy, "-a", f"again={adapters['mirror']}")
    assert (same.code, same.out) == (0, f"{copy}\n")
    taken = cli("add", copy, "-a", f"again={adapters['echo']}")
    assert (taken.code, taken.out) == (2, "")


def test_validate_writes_its_report(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    result = cli("validate", bundle, "--json", tmp_path / "report.json")
    assert result.code == 0
    assert re.search(r"^passed: (\d+) of \1 cases against the recorded goldens", result.out, re.M)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["passed"]
    assert {case["status"] for case in data["cases"]} == {"passed"}
    assert data["adapters"] == ["echo", "mirror", "shout"]


def test_export_closes_with_what_it_took(cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = MODELS / "adapters" / "shout"
    output = tmp_path / "out"
    result = cli("export", base, "-a", f"s={adapter}", "-o", output, "--sites", "adapters")
    assert (result.code, result.out) == (0, f"{output}\n")
    closing = re.fullmatch(
        r"exported in ([\d.]+) s, peak memory (\d+) MiB, ([\d,]+) bytes written",
        result.err.splitlines()[-1],
    )
    assert closing is not None
    files = [file for file in output.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files if file.name != "lora_edge.json")
    assert int(closing[3].replace(",", "")) == size
    assert float(closing[1]) > 0
    assert int(closing[2]) > 0


OPTIONS = {
    "train": ["--output", "--rank", "--alpha", "--target-modules", "--rslora", "--rank-pattern",
              "--alpha-pattern", "--epochs", "--lr", "--batch-size", "--seed", "--force"],
    "export": ["--adapter", "--output", "--mode", "--form", "--backend", "--sites", "--force"],
    "add": ["--adapter"],
    "run": ["--adapter", "--prompt", "--input", "--max-new-tokens", "--temperature", "--top-k",
            "--top-p", "--seed", "--stop", "--chat", "--stream", "--json", "--provider"],
    "validate": ["--reference", "--adapter", "--json"],
    "inspect": ["--base", "--json"],
}  # fmt: skip


@pytest.mark.parametrize("verb", OPTIONS)
def test_help_names_the_options(verb: str, cli: Cli) -> None:
    result = cli(verb, "--help")
    assert (result.code, result.err) == (0, "")
    for option in OPTIONS[verb]:
        assert re.search(rf"(^|\s){option}\b", result.out)
    assert verb in cli("--help").out


def test_an_unknown_verb_is_a_usage_error(cli: Cli) -> None:
    result = cli("explode")
    assert (result.code, result.out) == (2, "")
    assert "explode" in result.err
