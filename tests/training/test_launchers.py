"""Two gloo processes on the CPU, by torchrun, by accelerate, sharded by FSDP, against one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_edge.errors import AdapterError
from lora_edge.training import Settings, train
from lora_edge.training.sharding import check_launch
from tests.support.examples import examples

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2")
ACCELERATE += ("--main_process_port", "0")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
TORCHRUN += ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
FSDP = (*ACCELERATE, "--use_fsdp", "--fsdp_version", "2")
FSDP += ("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
LAUNCHERS = {"torchrun": TORCHRUN, "accelerate": (*ACCELERATE, "--multi_gpu"), "fsdp": FSDP}
CLOSE = 1e-3  # sums in another order; Adam divides the rounding of small gradients by itself
SETTINGS: dict[str, Any] = {"max_steps": 6, "lr": 1e-2, "rank": 3, "eval_split": 0.2}
SETTINGS |= {"eval_every": 3, "device": "cpu", "batch_size": 2}


def difference(one: Path, two: Path) -> float:
    """Largest difference of a tensor, relative to its size."""
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    return max(float((first[k] - second[k]).norm() / first[k].norm()) for k in first)


def line(base: Path, data: Path, settings: Mapping[str, Any], output: Path) -> list[str]:
    """The command after the launcher."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    return ["-m", "lora_edge.cli", "train", str(base), str(data), *options, "-o", str(output)]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unequal target counts, so that a mean of means would differ."""
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"say {n}:", "completion": " a" * n} for n in range(1, 11)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.fixture(scope="module")
def alone(base: Path, counted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, on the global batch of the two."""
    settings = Settings(**{**SETTINGS, "batch_size": 4})
    return train(base, counted, tmp_path_factory.mktemp("alone") / "alone", settings=settings)


@pytest.mark.parametrize(
    "launcher",
    examples(LAUNCHERS, ["torchrun"]),
)
def test_two_processes_are_one_on_the_same_global_batch(
    launcher: str, base: Path, counted: Path, alone: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    done = subprocess.run(
        [*LAUNCHERS[launcher], *line(base, counted, SETTINGS, both)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(both)
    assert "6 steps of 4 examples; evaluated on 2 examples" in done.stderr
    assert difference(alone, both) < CLOSE
    results = [json.loads((p / "training.json").read_text())["result"] for p in (alone, both)]
    assert results[0]["evaluation"]["eval_loss"] == pytest.approx(
        results[1]["evaluation"]["eval_loss"], rel=1e-4
    )
    assert results[0]["trainable_parameters"] == results[1]["trainable_parameters"]
    assert {path.name for path in alone.iterdir()} == {path.name for path in both.iterdir()}
    assert not (tmp_path / "both.run").exists()


def test_half_the_batch_is_told_apart(
    base: Path, counted: Path, alone: Path, tmp_path: Path
) -> None:
    other = train(base, counted, tmp_path / "other", settings=Settings(**SETTINGS))
    assert difference(alone, other) > 0.1


@pytest.mark.long
def test_a_sharded_run_goes_on_from_the_shards_of_both(
    base: Path, counted: Path, tmp_path: Path
) -> None:
    """Ended politely on the way: both processes wrote their share, and read it again."""
    settings = {"max_steps": 100, "lr": 1e-3, "rank": 3, "device": "cpu", "batch_size": 1}
    cut, run = tmp_path / "cut", tmp_path / "cut.run"
    command = [*FSDP, *line(base, counted, settings, cut)]
    started = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert started.stderr is not None
    while not started.stderr.readline().startswith("step "):
        assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    started.communicate()
    assert not cut.exists()
    shards = {path.name for path in run.glob("checkpoint-*/pytorch_model_fsdp_0/*.distcp")}
    assert shards == {"__0_0.distcp", "__1_0.distcp"}
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from " in done.stderr
    whole = train(base, counted, tmp_path / "whole", **{**settings, "batch_size": 2})
    assert difference(whole, cut) < CLOSE


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed is on"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP is on in version 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"init": "pissa"}, "init pissa"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            {"modules_to_save": ["lm_head"]},
            "lm_head is trained as a copy",
        ),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            {},
            "was asked for several processes on the CPU",
        ),
    ],
)
def test_a_launch_that_would_not_do_what_was_asked_is_refused(
    variables: dict[str, str],
    options: dict[str, Any],
    message: str,
    base: Path,
    counted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AdapterError, match=message):
        train(base, counted, tmp_path / "a", settings=Settings(**SETTINGS, **options))
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize("used", [{"MASTER_PORT": "29500"}, {"ACCELERATE_USE_CPU": "True"}])
def test_an_address_that_the_cluster_has_set_is_no_launch_of_several(
    used: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "10.0.0.1", **used}.items():
        monkeypatch.setenv(name, value)
    check_launch(Settings(**SETTINGS))
