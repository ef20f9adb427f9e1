"""Whole runs: resumed, interrupted, evaluated, accumulated, repeated from their record."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_edge.base.checkpoint import resolve_base
from lora_edge.errors import (
    AdapterError,
    BundleError,
    DataError,
    InterruptedRunError,
    OutOfMemoryError,
)
from lora_edge.training import Settings, plan, train
from lora_edge.training.batches import collate
from lora_edge.training.callbacks import Progress, read_metrics
from lora_edge.training.checkpoints import latest_checkpoint
from lora_edge.training.data import read_data
from lora_edge.training.head import target_logits
from lora_edge.training.model import load_model, load_tokenizer
from lora_edge.training.record import read_recipe
from lora_edge.training.tokens import tokenize
from tests.support.paths import ROOT

RUN: dict[str, Any] = {"max_steps": 12, "batch_size": 2, "lr": 1e-2, "rank": 3, "dropout": 0.2}
WORDS = ("one", "three", "eleven", "two", "seven", "twenty", "six")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl"
    rows = [{"prompt": f"say {word}:", "completion": f" {word}!"} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def result(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "training.json").read_text())["result"]
    return found


def difference(one: Path, other: Path) -> float:
    """Largest difference of a tensor, relative to its size."""
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[k] - second[k]).norm() / first[k].norm()) for k in first)


def killer(step: int) -> Callable[[Progress], None]:
    """Sends this process a polite kill after a step."""

    def kill(at: Progress) -> None:
        if at.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return kill


@pytest.mark.parametrize("options", [{}, {"group_by_length": True, "loraplus_ratio": 4.0}])
def test_a_resumed_run_is_the_uninterrupted_one(
    base: Path, words: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    settings = Settings(**RUN, **options)
    whole = train(base, words, tmp_path / "whole", settings=settings)
    target = tmp_path / "cut"
    with pytest.raises(InterruptedRunError, match=r"interrupted at step 6 of 12; .*checkpoint-6"):
        train(base, words, target, settings=settings, progress=killer(5))
    assert not target.exists()
    with pytest.raises(BundleError, match=r"holds an interrupted run, up to checkpoint-6") as error:
        train(base, words, target, settings=settings)
    assert "--resume" in error.value.hint
    with pytest.raises(AdapterError, match="was begun with another lr"):
        train(base, words, target, settings=settings, lr=1e-3, resume=True)
    seen: list[Progress] = []
    train(base, words, target, settings=settings, resume=True, progress=seen.append)
    assert [at.step for at in seen] == list(range(7, 13))
    assert abs(result(whole)["final_loss"] - result(target)["final_loss"]) <= 1e-6
    assert result(whole)["adapter_sha256"] == result(target)["adapter_sha256"]
    assert [row["step"] for row in read_metrics(target / "metrics.jsonl")] == list(range(1, 13))
    assert not (tmp_path / "cut.run").exists()
    again = train(base, words, tmp_path / "again", settings=settings, seed=1)  # control
    assert result(whole)["adapter_sha256"] != result(again)["adapter_sha256"]


@pytest.mark.long
def test_after_a_hard_kill_the_latest_whole_checkpoint_is_used(
    base: Path, words: Path, tmp_path: Path
) -> None:
    settings = Settings(**{**RUN, "max_steps": 200}, save_every=20)
    options = ["--max-steps", "200", "--save-every", "20", "--batch-size", "2", "--lr", "1e-2"]
    options += ["--rank", "3", "--dropout", "0.2"]
    command = [sys.executable, "-m", "lora_edge", "train", base, words, *options, "-o"]
    started = subprocess.Popen([*command, tmp_path / "a"], stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    while not started.stderr.readline().startswith("step 40/"):  # after checkpoint-20 was written
        assert started.poll() is None
    started.kill()
    started.communicate()
    assert started.returncode == -signal.SIGKILL
    run = tmp_path / "a.run"
    kept = latest_checkpoint(run)
    assert kept is not None
    (run / "checkpoint-199").mkdir()  # killed while it wrote
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 199, "lo')
    notes: list[str] = []
    train(base, words, tmp_path / "a", settings=settings, resume=True, notify=notes.append)
    assert notes[-1] == f"going on from {kept}"
    whole = train(base, words, tmp_path / "whole", settings=settings)
    assert abs(result(whole)["final_loss"] - result(tmp_path / "a")["final_loss"]) <= 1e-6
    assert result(whole)["adapter_sha256"] == result(tmp_path / "a")["adapter_sha256"]
    steps = [row["step"] for row in read_metrics(tmp_path / "a" / "metrics.jsonl")]
    assert steps == list(range(2, 201, 2))


def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(
    base: Path, words: Path, tmp_path: Path
) -> None:
    settings = Settings(**RUN, save_every=3)
    whole = train(base, words, tmp_path / "whole", settings=settings)
    target, run = tmp_path / "cut", tmp_path / "cut.run"
    with pytest.raises(InterruptedRunError):
        train(base, words, target, settings=settings, progress=killer(7))
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    damaged = run / "checkpoint-8" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    notes: list[str] = []
    train(base, words, target, settings=settings, resume=True, notify=notes.append)
    assert notes[0].startswith("checkpoint-8 is passed over: optimizer.pt is damaged (")
    assert f"going on from {run / 'checkpoint-6'}" in notes
    assert result(whole)["adapter_sha256"] == result(target)["adapter_sha256"]
    assert not run.exists()


def test_nothing_to_resume_is_said(base: Path, words: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no whole checkpoint to go on from"):
        train(base, words, tmp_path / "a", settings=Settings(**RUN), resume=True)


@pytest.mark.parametrize("full", [False, True])
def test_accumulated_batches_are_one_large_batch(
    base: Path, words: Path, tmp_path: Path, full: bool
) -> None:
    options = {**RUN, "dropout": 0.0, "max_steps": 4, "full_logits": full}
    large = train(base, words, tmp_path / "large", **{**options, "batch_size": 4})
    small = train(base, words, tmp_path / "small", **{**options, "batch_size": 1}, accumulate=4)
    other = train(base, words, tmp_path / "other", **{**options, "batch_size": 1})
    assert difference(large, small) < 1e-3  # Adam's first steps divide rounding by rounding
    assert difference(large, other) > 0.1


def test_full_logits_train_the_same_adapter(base: Path, words: Path, tmp_path: Path) -> None:
    options = {**RUN, "dropout": 0.0, "max_steps": 4}
    picked = train(base, words, tmp_path / "picked", **options)
    whole = train(base, words, tmp_path / "whole", **options, full_logits=True)
    assert difference(picked, whole) < 1e-3


def test_gradient_checkpointing_changes_nothing(base: Path, words: Path, tmp_path: Path) -> None:
    options = {**RUN, "dropout": 0.0, "max_steps": 3}
    plain = train(base, words, tmp_path / "plain", **options)
    again = train(base, words, tmp_path / "again", **options, gradient_checkpointing=True)
    assert difference(plain, again) < 1e-3


def test_the_best_weights_are_kept_and_what_they_score_is_true(
    base: Path, words: Path, tmp_path: Path
) -> None:
    """Evaluated on answers that contradict those trained: the last weights are not the best."""
    from peft import PeftModel

    settings = Settings(
        **{**RUN, "dropout": 0.0, "lr": 0.05, "max_steps": 8}, eval_every=1, schedule="constant"
    )
    held = tmp_path / "held.csv"
    held.write_text("prompt,completion\nsay one:,QXZ\nsay eleven:,ZZQQ%\n")
    made = train(base, words, tmp_path / "a", settings=settings, evaluation=held)
    rows = [row for row in read_metrics(made / "metrics.jsonl") if "eval_loss" in row]
    best = min(rows, key=lambda row: row["eval_loss"])
    found = result(made)
    assert found["best_step"] == best["step"] < 8
    assert found["evaluation"]["eval_loss"] == best["eval_loss"] < rows[-1]["eval_loss"]
    base_of = resolve_base(base)
    examples = tokenize(read_data(held).rows, load_tokenizer(base_of), 64)
    batch = collate(examples, 0)
    labels = batch.pop("labels")
    model = PeftModel.from_pretrained(load_model(base_of), made).eval()
    with torch.no_grad():
        logits, targets = target_logits(model, batch, labels, None)
        loss = float(torch.nn.functional.cross_entropy(logits, targets))
        met = float((logits.argmax(-1) == targets).double().mean())
    assert found["evaluation"]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["evaluation"]["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["evaluation"]["eval_accuracy"] == pytest.approx(met)
    header = json.loads((made / "training.json").read_text())["evaluation"]
    assert (header["file"], header["examples"]) == ("held.csv", 2)


def test_patience_ends_a_run_that_gets_no_better(base: Path, words: Path, tmp_path: Path) -> None:
    options = {**RUN, "lr": 0.3, "max_steps": 60, "eval_split": 0.3, "eval_every": 1}
    notes: list[str] = []
    made = train(base, words, tmp_path / "a", **options, patience=2, notify=notes.append)
    stopped = f"stopped after step {result(made)['steps']}: no better for 2 evaluations"
    assert stopped in notes
    assert result(made)["steps"] == result(made)["best_step"] + 2 < 60


def test_a_run_is_repeated_from_its_record(base: Path, words: Path, tmp_path: Path) -> None:
    made = train(base, words, tmp_path / "a", **RUN, eval_split=0.3, rank_pattern={"q_proj": 2})
    recipe = read_recipe(made / "training.json")
    assert (recipe.base, recipe.data) == (str(base), str(words))
    again = train(recipe.base, str(recipe.data), tmp_path / "b", settings=recipe.settings)
    assert (made / "training.json").read_bytes() == (again / "training.json").read_bytes()
    assert result(again)["adapter_sha256"] == recipe.adapter_sha256


def test_records_of_shipped_adapters_are_read() -> None:
    models = ROOT / "models"
    recipe = read_recipe(models / "adapters" / "echo" / "training.json")
    assert (recipe.data, recipe.adapter_sha256) == (None, None)
    assert recipe.settings.full_logits  # how release 0.1 did it
    assert list(recipe.settings.rank_pattern) == [
        "q_proj",
        r"layers\.0\.mlp\.down_proj",
        "mlp\\..*",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not the record of a training run: base is missing"),
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "training.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_recipe(file)


def test_a_plan_counts_what_training_would_train(base: Path, words: Path, tmp_path: Path) -> None:
    options = {**RUN, "target_modules": ["q_proj", "up_proj"], "layers": [1]}
    found = plan(base, words, **options)
    made = train(base, words, tmp_path / "a", **options)
    assert found.trainable == result(made)["trainable_parameters"] == 3 * (32 + 32 + 32 + 48)
    assert found.modules == ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    assert found.steps == 12
    assert found.modes == {"switchable": (), "merged": ()}
    assert found.memory.trained == 16 * found.trainable
    assert found.memory.base == 4 * found.parameters
    assert not list(tmp_path.glob("*.run"))
    smaller = plan(base, words, **{**options, "batch_size": 1}).memory
    assert smaller.activations * 2 == pytest.approx(found.memory.activations, abs=2)
    again = plan(base, words, **options, gradient_checkpointing=True).memory
    assert 0 < again.activations < found.memory.activations


GROWTH = """
import sys
from pathlib import Path
from lora_edge.training import plan, train
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))
given = dict(max_steps=8, batch_size=8, rank=16, device="cpu")
base, data, out = sys.argv[1:]
memory = plan(base, data, **given).memory
train(base, data, out, **given)
print(memory.total, memory.total - memory.process, peak(), peak() - memory.process)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="asks Linux for the memory")
@pytest.mark.long
def test_the_memory_that_a_plan_states_is_what_a_run_takes(tmp_path: Path) -> None:
    """Within a factor of 2 of the growth, and of 1.5 of the whole process, at its peak."""
    base = ROOT / "models" / "tiny-llama"
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "a word " * n, "completion": " b c" * n} for n in range(4, 36)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, base, data, tmp_path / "a"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stated, stated_growth, peak, growth = map(int, done.stdout.split())
    assert 1 / 1.5 < stated / peak < 1.5
    assert 1 / 2 < stated_growth / growth < 2


def test_out_of_memory_says_what_to_lower(
    base: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_edge.training import target_trainer

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    monkeypatch.setattr(target_trainer, "target_logits", full)
    with pytest.raises(OutOfMemoryError, match="out of memory with batch_size 4") as error:
        train(base, words, tmp_path / "a", **{**RUN, "batch_size": 4})
    for advice in ("--batch-size to 2", "--accumulate to 2", "--base-format bf16", "--max-length"):
        assert advice in error.value.hint
    assert not list(tmp_path.glob("a*"))


def test_a_base_in_bf16_trains_factors_in_float32(base: Path, words: Path, tmp_path: Path) -> None:
    made = train(base, words, tmp_path / "a", **RUN, base_format="bf16")
    tensors = load_file(made / "adapter_model.safetensors").values()
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    narrow, wide = (plan(base, words, **RUN, base_format=x).memory.base for x in ("bf16", "fp32"))
    assert narrow * 2 == wide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "sees no CUDA device"),
        ({"base_format": "4bit"}, r"base_format is 4bit \(QLoRA\) on the CPU"),
        ({"precision": "fp16"}, "precision is fp16, which PyTorch does not train in on a CPU"),
        ({"patience": 2}, "patience is set, and there is nothing to evaluate on"),
        ({"eval_split": 0.3, "save_every": 2}, "save_every is set beside an evaluation"),
        ({"layers": [7]}, "layers 7 have none of the target modules"),
        ({"layers": [0], "target_modules": ".*q_proj"}, "layers are given beside a regex"),
        ({"modules_to_save": ["head"]}, "modules_to_save 'head' matches no module"),
        ({"bias": "some"}, "bias is 'some', expected one of none, all, lora_only"),
        ({"init": "loftq"}, "init is 'loftq', expected one of"),
        ({"init": "pissa", "dora": True}, "init is pissa with DoRA"),
        ({"packing": True, "group_by_length": True}, "packing and group_by_length are both set"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"loraplus_ratio": 0}, "loraplus_ratio is 0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is refused without CUDA")
def test_what_cannot_be_meant_is_refused(
    base: Path, words: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        train(base, words, tmp_path / "a", **{**RUN, **options})
    assert not list(tmp_path.glob("a*"))


def test_precision_is_refused_where_the_hardware_lacks_it(
    base: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_edge.training import devices

    monkeypatch.setattr(devices, "_has_bf16", lambda _: False)
    with pytest.raises(AdapterError, match="precision is bf16, and this cpu has no bf16"):
        train(base, words, tmp_path / "a", **RUN, precision="bf16", device="cpu")
    monkeypatch.setattr(devices, "_has_bf16", lambda _: True)
    narrow = train(base, words, tmp_path / "a", **RUN, precision="bf16", device="cpu")
    wide = train(base, words, tmp_path / "b", **RUN, device="cpu")
    assert 0 < difference(wide, narrow) < 1.0


def test_a_split_that_leaves_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": "big" if n else "small"} for n in range(8)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"eval_split 0\.01 of 8 examples is 0"):
        train(base, path, tmp_path / "a", eval_split=0.01)
    with pytest.raises(DataError, match="leaves no example of the label 'small'"):
        plan(base, path, eval_split=0.9)
    shutil.copy(path, tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"holds pair data, and .* labelled data"):
        train(base, path, tmp_path / "a", evaluation=tmp_path / "pairs.jsonl")


def test_tensorboard_gets_the_losses_where_it_is_installed(
    base: Path, words: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = train(base, words, tmp_path / "a", **{**RUN, "max_steps": 2})
    events = EventAccumulator(str(made / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    logged = [row["loss"] for row in read_metrics(made / "metrics.jsonl")]
    assert losses == pytest.approx(logged, rel=1e-6)


def test_without_matplotlib_there_is_no_plot_and_a_remark(
    base: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    notes: list[str] = []
    made = train(base, words, tmp_path / "a", **{**RUN, "max_steps": 1}, notify=notes.append)
    assert not (made / "loss.png").exists()
    assert notes[-1].startswith("no loss.png: it needs matplotlib")
