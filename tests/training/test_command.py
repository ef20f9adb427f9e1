"""``lora-edge train``: options, plans, presets, records, and each mistake's one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT

import pytest
from click.testing import CliRunner, Result

from lora_edge.cli import main
from lora_edge.cli.train import command
from lora_edge.training.presets import PRESETS
from lora_edge.training.settings import Settings

Run = Callable[..., Result]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(x) for x in arguments], catch_exceptions=False)


def settings_of(adapter: Path) -> Settings:
    record = json.loads((adapter / "training.json").read_text())
    return Settings.from_json(record["settings"])


def test_every_preset_is_made_of_settings_that_can_be_meant() -> None:
    for name, values in PRESETS.items():
        assert Settings(**values) != Settings(), name


def test_what_is_given_goes_over_the_preset(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    options = [
        "--preset",
        "strong",
        "--rank",
        2,
        "--max-steps",
        1,
        "--layers",
        "0-1",
        "--bias",
        "all",
    ]
    result = run(base, data, "-o", out, *options, "--modules-to-save", "model.norm")
    assert result.exit_code == 0
    found = settings_of(out)
    assert (found.rank, found.alpha, found.rslora, found.loraplus_ratio) == (2, 32.0, True, 4.0)
    assert (found.layers, found.bias, found.modules_to_save) == ((0, 1), "all", ("model.norm",))


def test_a_dry_run_says_what_export_would_take_and_writes_nothing(
    base: Path, data: Path, tmp_path: Path
) -> None:
    result = run(base, data, "--dry-run", "--target-modules", "q_proj", "--rank", 2)
    assert result.exit_code == 0
    lines = dict(line.split(None, 1) for line in result.stdout.splitlines() if line[0] != " ")
    assert lines["trainable"].startswith("256 parameters, ")  # 2 layers of 2 * (32 + 32)
    assert (lines["switchable"], lines["merged"], lines["modules"]) == ("yes", "yes", "2")
    assert lines["memory"].startswith("about ")
    assert "3 examples, " in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}


def test_a_record_repeats_a_run_and_says_so(base: Path, data: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(base, data, "-o", first, "--max-steps", 2, "--rank", 2, "--eval-split", 0.4)
    again = run("--from", first / "training.json", "-o", tmp_path / "again")
    assert "the same bytes as the record's" in again.stderr
    other = run("--from", first / "training.json", "-o", tmp_path / "other", "--seed", 7)
    assert "the record's" not in other.stderr
    assert settings_of(tmp_path / "other").rank == 2
    data.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(Exception, match=r"has sha256 .*, the record was made with"):
        run("--from", first / "training.json", "-o", tmp_path / "late")


def test_from_data_to_a_bundle_in_one_line(base: Path, data: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    line = [
        base,
        data,
        "-o",
        tmp_path / "hello",
        "--max-steps",
        5,
        "--lr",
        0.02,
        "--export",
        bundle,
    ]
    result = run(*line)
    assert result.stdout == f"{tmp_path / 'hello'}\n"
    manifest = json.loads((bundle / "lora_edge.json").read_text())
    assert manifest["adapters"]["hello"]["proved"]
    with pytest.raises(Exception, match="exists and is not empty"):  # before hours are spent
        run(base, data, "-o", tmp_path / "other", "--export", bundle)
    assert not (tmp_path / "other").exists()


def mistakes(base: Path, folder: Path) -> dict[str, tuple[list[object], str, str]]:
    """What is typed -> what is said, and what is advised."""
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")

    def file(name: str, content: bytes) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    good = b'{"prompt": "a", "completion": "b"}\n'
    labelled = file("labels.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    unseen = file("unseen.jsonl", b'{"text": "a", "label": "z"}\n')
    pairs = file("good.jsonl", good)
    return {
        "columns": (
            [base, file("columns.jsonl", b'{"question": "a", "answer": "b"}\n')],
            "columns.jsonl:1: expected the keys 'messages' or 'prompt' and 'completion'",
            "Each line is",
        ),
        "empty": ([base, file("empty.csv", b"")], "empty.csv holds no examples", "Each line is"),
        "encoding": (
            [base, file("latin.jsonl", good + b'{"prompt": "\xe9", "completion": "b"}\n')],
            "latin.jsonl:2: the line is not UTF-8: byte 12",
            "Each line is",
        ),
        "label": (
            [base, labelled, "--eval", unseen],
            "unseen.jsonl:1: the label 'z' is not among those trained: x, y",
            "Each line is",
        ),
        "targets": (
            [base, pairs, "--target-modules", "query"],
            "name 'query' matches no module of the base",
            "Its linear modules are down_proj",
        ),
        "adapter": ([adapter, pairs], "is an adapter, not a base model", "Give its base here"),
        "cut": (
            [base, pairs, "--max-length", 2],
            "good.jsonl:1: no token of the completion is left within 2 tokens",
            "--drop-too-long",
        ),
        "record": (["--from", pairs], "is not the record of a training run", "training.json"),
        "nothing": ([], "give BASE and DATA, or --from RECORD", ""),
        "layers": ([base, pairs, "--layers", "3-1"], "'3-1' is not a layer or a span", ""),
    }


@pytest.mark.parametrize(
    "what",
    "columns empty encoding label targets adapter cut record nothing layers".split(),  # noqa: SIM905
)
def test_a_mistake_has_one_line_and_a_hint(
    what: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message, hint = mistakes(base, tmp_path)[what]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *map(str, arguments), "-o", str(tmp_path / "out")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.lower().startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert hint in said[-1]
    assert "Traceback" not in "".join(said)
    assert not list(tmp_path.glob("out*"))


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(
    base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-m", "lora_edge", "train", str(base), str(data), "-o", str(out)]
    line += ["--max-steps", "199", "--batch-size", "1"]
    started = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stderr is not None
    while not started.stderr.readline().startswith("step "):
        assert started.poll() is None
    started.send_signal(SIGINT)
    stdout, stderr = started.communicate()
    assert started.returncode == 130, stderr
    assert stdout == ""
    error, hint = stderr.strip().splitlines()[-2:]
    assert error.startswith("error: interrupted at step ")
    assert "checkpoint-" in error
    assert hint == "hint: Give the same command with --resume to go on."
    assert not out.exists()
    assert list((tmp_path / "out.run").glob("checkpoint-*/adapter_model.safetensors"))
