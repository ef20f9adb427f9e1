"""Bad input at the command line: one line, a hint, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.commands import Cli, Result
from tests.support.examples import examples

WEIGHTS = "adapter_model.safetensors"
PROGRESS = ("capturing ", "checking the base graph ", "adding branches ", "validating every ")
FULL = OSError(28, "No space left on device")


def _refused(result: Result, *words: str, code: int = 2) -> None:
    """The command said what is wrong in one line, what to do in another, and nothing else."""
    assert (result.code, result.out) == (code, "")
    lines = [line for line in result.err.splitlines() if not line.startswith(PROGRESS)]
    assert [line.partition(" ")[0] for line in lines] == ["error:", "hint:"], result.err
    assert all(len(line) > 12 for line in lines)
    for word in words:
        assert word in lines[0]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def adapter(adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a good adapter, to be spoiled."""
    return Path(shutil.copytree(adapters["shout"], tmp_path / "in" / "shout"))


# --- a missing file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export {no} -o {out}", "base model"),
        ("export {base} -a a={no} -o {out}", "adapter"),
        ("run {no} -p x", "not a bundle"),
        ("validate {no}", "not a bundle"),
        ("validate {bundle} --reference {no}", "base model"),
        ("inspect {no}", "does not exist"),
        ("add {no} -a a={adapter}", "not a bundle"),
        ("add {bundle} -a a={no}", "adapter"),
        ("run {bundle} --input {no}", "No such file"),
        ("train {base} {no} -o {out}", "No such file"),
        ("train {no} {data} -o {out}", "base model"),
    ],
)
def test_a_missing_file(
    command: str, words: str, cli: Cli, base: Path, bundle: Path, adapter: Path, tmp_path: Path
) -> None:
    places = {"base": base, "bundle": bundle, "adapter": adapter, "out": tmp_path / "out"}
    places["data"] = tmp_path / "in" / "data.jsonl"
    places["data"].write_text('{"prompt": "a", "completion": "b"}\n')
    missing = tmp_path / "no" / "such"
    result = cli(*(part.format(no=missing, **places) for part in command.split()))
    _refused(result, words, str(missing))
    assert _names(tmp_path) == ["in"]


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_an_adapter_that_lacks_a_file(name: str, cli: Cli, bundle: Path, adapter: Path) -> None:
    (adapter / name).unlink()
    _refused(cli("add", bundle, "-a", f"a={adapter}"), name)


def test_a_byte_order_mark_is_taken(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    plain = '{"prompt": "Word: river Answer:"}\n'
    said = []
    for mark in ("", "\ufeff"):
        file.write_text(mark + plain, encoding="utf-8")
        result = cli("run", bundle, "--input", file, "--max-new-tokens", 2)
        assert result.code == 0, result.err
        said.append(result.out)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "has no lines"),
        ('{"prompt": "a"}\n{"prompt": ', ":2: the line is not JSON"),
        ('{"prompt": 3}\n', ":1: 'prompt' is missing or no text"),
        ('{"prompt": "a", "adapter": "nobody"}', "nobody"),
        ('{"prompt": "a", "adapter": {"shout": NaN}}', "holds NaN"),
        ('{"prompt": "a", "adapter": {"shout": "much"}}', "expected a number"),
        ('{"prompt": "a", "adapter": 3}', "expected a name"),
    ],
)
def test_a_jsonl_file_that_is_not_as_expected(
    lines: str, words: str, cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines)
    _refused(cli("run", bundle, "--input", file), words)


# --- an adapter that cannot be right -------------------------------------------------------------


def _rewrite(adapter: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, key: np.ascontiguousarray(change(tensors[key]))}, adapter / WEIGHTS)


def _other_shape(adapter: Path) -> None:
    _rewrite(adapter, lambda a: a[:, :-8])


def _other_fingerprint(adapter: Path) -> None:
    record = json.loads((adapter / "training.json").read_text())
    record["base_fingerprint"] = "0" * 64
    (adapter / "training.json").write_text(json.dumps(record))


def _pickle(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


def _nan(adapter: Path) -> None:
    _rewrite(adapter, lambda a: np.where(np.arange(a.shape[1]) == 3, np.float32("nan"), a))


def _truncated(adapter: Path) -> None:
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("verb", ["export", "add"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_other_shape, ("q_proj", "184", "192")),
        (_other_fingerprint, ("fingerprint", "000000000000")),
        (_pickle, ("adapter_model.bin", "pickle")),
        (_nan, ("NaN", "q_proj")),
        (_truncated, (WEIGHTS, "cut off")),
    ],
)
def test_a_spoiled_adapter(
    verb: str,
    spoil: Callable[[Path], None],
    words: tuple[str, ...],
    cli: Cli,
    base: Path,
    bundle: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    spoil(adapter)
    before = _tree(bundle)
    if verb == "export":
        result = cli("export", base, "-a", f"new={adapter}", "-o", tmp_path / "out")
    else:
        result = cli("add", bundle, "-a", f"new={adapter}")
    _refused(result, *words)
    assert _names(tmp_path) == ["in"]
    assert _tree(bundle) == before


def test_a_truncated_base(cli: Cli, base: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(base, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1000])
    _refused(cli("export", cut, "-o", tmp_path / "out"), "cut off")
    assert _names(tmp_path) == ["cut"]


@pytest.mark.parametrize("choice", ["nobody", "nobody=0.5"])
def test_an_unknown_adapter_at_run_time(choice: str, cli: Cli, bundle: Path) -> None:
    _refused(cli("run", bundle, "-a", choice, "-p", "x"), "'nobody'", "echo, mirror, none, shout")


@pytest.mark.parametrize(
    "setting", ["--max-new-tokens=0", "--max-new-tokens=100000", "--top-p=2", "--temperature=-1"]
)
def test_a_setting_outside_its_range(setting: str, cli: Cli, bundle: Path) -> None:
    _refused(cli("run", bundle, "-p", "x", setting), setting.partition("=")[2])


# --- the output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["export", "train"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_output_folder_that_is_not_empty(
    verb: str, force: list[str], cli: Cli, base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    given = [base, data] if verb == "train" else [base]
    _refused(cli(verb, *given, "-o", output, *force), str(output))
    assert _names(tmp_path) == ["data.jsonl", "out"]
    assert (output / "mine.txt").read_text() == "mine"


def test_an_output_folder_below_a_file(cli: Cli, base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    _refused(cli("export", base, "-o", tmp_path / "file" / "out"), "cannot write")
    assert _names(tmp_path) == ["file"]


def test_a_report_that_cannot_be_written(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    result = cli("validate", bundle, "--json", tmp_path / "no" / "report.json")
    assert result.code == 2
    assert result.out == ""  # it is known before the work is done
    assert "no/report.json does not exist" in result.err


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "shutil.copyfile",  # the tokenizer's files
        "lora_edge.files.transaction.os.replace",  # the first manifest
        "lora_edge.parity.record.record.save_golden",  # after the check has passed
        "lora_edge.exporting.export.bundle_card",  # the last file
        "lora_edge.files.transaction.os.rename",  # publishing
    ],
)
def test_a_disk_that_is_full_at_some_stage(
    place: str,
    cli: Cli,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr(place, full)
    _refused(cli("export", base, "-o", tmp_path / "out"), "No space left")
    assert _names(tmp_path) == []


def test_a_disk_that_is_full_while_an_adapter_is_added(
    cli: Cli, bundle: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise FULL

    before = _tree(bundle)
    monkeypatch.setattr("lora_edge.files.transaction.os.replace", full)
    _refused(cli("add", bundle, "-a", f"new={adapter}"), "No space left")
    assert _tree(bundle) == before
    assert not (bundle / "adapters" / "new").exists()


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lora_edge", *map(str, arguments)]


def _limited(limit: int, *arguments: object) -> Result:
    """Run the command in a process whose files cannot grow beyond a limit, as on a full disk."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        _command(*arguments),
        preexec_fn=limit_files,
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("limit", examples([1000, 2_000_000], [2_000_000]))
def test_weights_that_the_disk_has_no_room_for(limit: int, base: Path, tmp_path: Path) -> None:
    """Neither the first kilobyte nor the middle of a data file of 4 MB."""
    _refused(_limited(limit, "export", base, "-o", tmp_path / "out"), "written")
    assert _names(tmp_path) == []


def test_an_adapter_that_the_disk_has_no_room_for(bundle: Path, adapter: Path) -> None:
    before = _tree(bundle)
    _refused(_limited(20_000, "add", bundle, "-a", f"new={adapter}"), WEIGHTS)
    assert _tree(bundle) == before
    assert not (bundle / "adapters" / "new").exists()


# --- a kill in the middle ------------------------------------------------------------------------


def _killed(number: signal.Signals, stage: str, *arguments: object) -> Result:
    """Start an export and kill it when it says that it is at a stage."""

    def hear_interrupts() -> None:  # which a shell's background job would ignore
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        _command("export", *arguments),
        preexec_fn=hear_interrupts,  # noqa: PLW1509  no thread holds a lock that it needs
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(stage):
            process.send_signal(number)
            break
    out, err = process.communicate()
    return Result(process.returncode, out, "".join(lines) + err)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("stage", ["capturing", "validating"])
def test_an_interrupt_leaves_nothing(
    number: signal.Signals, stage: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    given = [f"-a{name}={path}" for name, path in adapters.items()]
    result = _killed(number, stage, base, *given, "-o", tmp_path / "out")
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1] == "interrupted; nothing was left behind"
    assert "Traceback" not in result.err
    assert _names(tmp_path) == []


def test_what_an_outright_kill_left_is_cleared_by_the_next_export(
    cli: Cli, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    given = ["-a", f"a={adapters['shout']}"]
    result = _killed(signal.SIGKILL, "validating", base, *given, "-o", output)
    assert result.code == -signal.SIGKILL
    left = _names(tmp_path)  # a folder and its lock, hidden, and not the bundle
    assert len(left) == 2
    assert all(name.startswith(".out.") for name in left)
    assert cli("export", base, "-o", output).code == 0
    assert _names(tmp_path) == ["out"]
    assert cli("validate", output).code == 0


def test_a_failed_replacement_leaves_the_old_bundle(
    cli: Cli, base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Path(shutil.copytree(bundle, tmp_path / "out"))
    before = _tree(old)

    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(os, "replace", full)
    _refused(cli("export", base, "-o", old, "--force"), "No space left")
    assert _tree(old) == before
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threads", "1000000"], "threads is 1000000, expected 1 to "),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--threads", "two"], "'two' is not a valid integer"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0, expected 1 or more"),
        (["--max-new-tokens", "2.5"], "'2.5' is not a valid integer"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--stop", ""], "stop is"),
        (["--seed", "-1"], "seed is -1"),
        (["--provider", "abacus"], "the execution provider 'abacus' is unknown"),
        (["--provider-option", "a"], "'a' is not K=V"),
        (["--provider-option", "a=1", "--provider-option", "a=2"], "a is given twice"),
        (["--provider-option", "a=1"], "the CPU provider takes no options, got a"),
        (["--verify", "some"], "'some' is not one of 'sampled', 'full'"),
    ],
)
def test_odd_options_of_run_are_refused_in_one_line(
    cli: Cli, bundle: Path, options: list[str], words: str
) -> None:
    found = cli("run", bundle, "-p", "a", *options)
    assert (found.code, found.out) == (2, "")
    lines = [line for line in found.err.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in found.err
