"""The trainer on a tiny base: what carries gradient, what is written, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import lora_edge
from lora_edge.base.checkpoint import resolve_base
from lora_edge.errors import AdapterError, BaseModelError, BundleError, LoraEdgeError
from lora_edge.training import train
from lora_edge.training.batches import collate
from lora_edge.training.callbacks import Progress
from lora_edge.training.data import read_data
from lora_edge.training.model import load_model, load_tokenizer
from lora_edge.training.tokens import tokenize

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 2, "lr": 1e-2, "rank": 3, "alpha": 5.0}


def config_of(adapter: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return loaded


def hash_of(adapter: Path) -> str:
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def logits_gradient(base: Path, data: Path, *, on_everything: bool = False) -> tuple[Any, Any]:
    """Gradient of the loss with respect to the logits, and which positions predict a target."""
    found = resolve_base(base)
    examples = tokenize(read_data(data).rows, load_tokenizer(found), 64)
    batch = collate(examples, pad_id=256)
    predicts = torch.zeros_like(batch["labels"], dtype=torch.bool)
    predicts[:, :-1] = batch["labels"][:, 1:] != -100
    if on_everything:
        batch["labels"] = batch["input_ids"]
    out = load_model(found)(**batch)
    out.logits.retain_grad()
    out.loss.backward()
    return out.logits.grad, predicts


def test_no_gradient_reaches_prompt_or_padding_positions(base: Path, data: Path) -> None:
    gradient, predicts = logits_gradient(base, data)
    assert torch.all(gradient[~predicts] == 0)
    assert torch.all(gradient[predicts].abs().sum(-1) > 0)
    control, _ = logits_gradient(base, data, on_everything=True)
    assert torch.any(control[~predicts] != 0)


def test_padding_is_on_the_right_and_masked(base: Path, data: Path) -> None:
    examples = tokenize(read_data(data).rows, load_tokenizer(resolve_base(base)), 64)
    batch = collate(examples, pad_id=256)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        assert tuple(batch["input_ids"][row, :length].tolist()) == example.input_ids
        assert batch["attention_mask"][row].sum() == length
        assert torch.all(batch["labels"][row, length:] == -100)


def test_same_seed_same_bytes_and_another_seed_others(
    base: Path, data: Path, tmp_path: Path
) -> None:
    first, again, other = (
        train(base, data, tmp_path / name, seed=seed, **QUICK)
        for name, seed in (("first", 4), ("again", 4), ("other", 5))
    )
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert hash_of(first) != hash_of(other)


def test_what_is_written(base: Path, data: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    notes: list[str] = []
    made = train(base, data, tmp_path / "made", progress=seen.append, notify=notes.append, **QUICK)
    written = {path.name for path in made.iterdir()} - {"tensorboard"}
    assert written == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.png",
        "metrics.jsonl",
        "training.json",
    }
    assert not (tmp_path / "made.run").exists()
    tensors = load_file(made / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for key, tensor in tensors.items() if "lora_B" in key)
    record = json.loads((made / "training.json").read_text())
    assert record["base_fingerprint"] == resolve_base(base).fingerprint()
    assert record["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert record["settings"]["alpha"] == 5.0
    assert record["result"]["steps"] == 4
    assert [at.step for at in seen] == [1, 2, 3, 4]
    assert record["result"]["final_loss"] == seen[-1].loss
    assert notes[0].startswith("3 examples, ")
    adapter = lora_edge.load_adapter(made)
    assert adapter.base_fingerprint == record["base_fingerprint"]
    assert len(adapter.modules) == 14  # 7 linear layers in each of 2 decoder layers; no lm_head


def test_the_loss_falls_on_what_is_learnt(base: Path, data: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    train(base, data, tmp_path / "a", epochs=30, lr=2e-2, batch_size=3, progress=seen.append)
    assert seen[-1].loss < seen[0].loss / 2


def test_weight_decay_shrinks_what_is_learnt(base: Path, data: Path, tmp_path: Path) -> None:
    def size(name: str, **options: float) -> float:
        made = train(base, data, tmp_path / name, **QUICK, **options)
        modules = lora_edge.load_adapter(made).modules.values()
        return sum(float((m.a**2).sum() + (m.b**2).sum()) for m in modules)

    free = size("free")
    assert size("zero", weight_decay=0.0) == free
    assert size("decayed", weight_decay=10.0) < 0.9 * free


def test_options_land_in_the_config_and_in_the_shapes(
    base: Path, data: Path, tmp_path: Path
) -> None:
    made = train(
        base,
        data,
        tmp_path / "made",
        target_modules=["q_proj", "down_proj"],
        rslora=True,
        rank_pattern={r"layers\.1\..*down_proj": 6, "down_proj": 2},
        alpha_pattern={"down_proj": 7.5},
        dropout=0.1,
        **QUICK,
    )
    config = config_of(made)
    assert config["use_rslora"] is True
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.1)
    ranks = {path: module.rank for path, module in lora_edge.load_adapter(made).modules.items()}
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 3,
        "model.layers.1.self_attn.q_proj": 3,
        "model.layers.0.mlp.down_proj": 2,
        "model.layers.1.mlp.down_proj": 6,
    }
    assert next(iter(config["rank_pattern"])).startswith("layers")  # the first match wins
    scaling = lora_edge.load_adapter(made).modules["model.layers.1.mlp.down_proj"].scaling
    assert scaling == pytest.approx(7.5 / 6**0.5)


def test_a_regex_selects_whole_paths(base: Path, data: Path, tmp_path: Path) -> None:
    made = train(base, data, tmp_path / "a", target_modules=r".*\.1\.self_attn\.[qk]_proj", **QUICK)
    assert set(lora_edge.load_adapter(made).modules) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    }


def test_conv1d_targets_are_marked_as_such(data: Path, gpt2: Path, tmp_path: Path) -> None:
    assert config_of(train(gpt2, data, tmp_path / "a", **QUICK))["fan_in_fan_out"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, "name 'q_prj' matches no module"),
        ({"target_modules": ["q_proj", "query"]}, "name 'query' matches no module"),
        ({"target_modules": r"q_proj"}, "regex 'q_proj' matches no module"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": ["mlp"]}, "matches model.layers.0.mlp, which is not a linear layer"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern key 'query' matches none of the 14"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern key 'lm_head' matches none"),
        ({"rank_pattern": {"q_proj": 0}}, "expected a whole number of at least 1"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected 0 or more"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 1e30}, "diverged"),
    ],
)
def test_refused_options(
    base: Path, data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message.replace("(", r"\(")):
        train(base, data, tmp_path / "out" / "a", **{**QUICK, **options})
    assert list((tmp_path / "out").glob("*")) == []


def test_refused_bases(base: Path, data: Path, tmp_path: Path) -> None:
    def refused(path: Path, message: str, **options: Any) -> None:
        with pytest.raises(BaseModelError, match=message):
            train(path, data, tmp_path / "a", **QUICK, **options)
        assert not (tmp_path / "a").exists()

    refused(tmp_path / "nowhere", "is not a folder")
    refused(base, "max_length is 65, but .* has 64 positions", max_length=65)
    refused(train(base, data, tmp_path / "adapter", **QUICK), "is an adapter, not a base model")

    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    refused(broken, "reads no tokenizer")
    shutil.copy(base / "tokenizer.json", broken)
    tensors = load_file(broken / "model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {key: value for key, value in tensors.items() if "layers.1" not in key},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(broken, "lacks 9 of its weights")
    config = json.loads((base / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    refused(broken, "its tokenizer makes token 258, but vocab_size is 200")
    (broken / "model.safetensors").write_bytes(b"\x00" * 20)
    refused(broken, "cannot be loaded|safetensors")


def test_an_output_that_is_in_the_way_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    made = train(base, data, tmp_path / "a", **QUICK)
    before = hash_of(made)
    with pytest.raises(BundleError, match="exists and is not empty"):
        train(base, data, made, seed=9, **QUICK)
    assert hash_of(made) == before
    train(base, data, made, seed=9, force=True, **QUICK)
    assert hash_of(made) != before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep")
    with pytest.raises(BundleError, match=r"has no adapter_config\.json"):
        train(base, data, foreign, force=True, **QUICK)
    assert (foreign / "mine.txt").read_text() == "keep"


def test_the_command_prints_the_path_and_only_the_path(
    base: Path, data: Path, tmp_path: Path
) -> None:
    from lora_edge.cli.train import command

    out = tmp_path / "a"
    arguments = [str(base), str(data), "-o", str(out), "--epochs", "1", "--rank", "2"]
    result = CliRunner().invoke(
        command,
        [
            *arguments,
            "--target-modules",
            "q_proj, up_proj",
            "--rank-pattern",
            "up_proj=4",
            "--alpha-pattern",
            "q_proj=2.5",
            "--rslora",
            "--weight-decay",
            "0.25",
        ],
        catch_exceptions=False,
    )
    assert result.stdout == f"{out}\n"
    assert "step 1/1  loss" in result.stderr
    config = config_of(out)
    assert config["rank_pattern"] == {"up_proj": 4}
    assert config["alpha_pattern"] == {"q_proj": 2.5}
    assert config["use_rslora"] is True
    assert json.loads((out / "training.json").read_text())["settings"]["weight_decay"] == 0.25

    refused = CliRunner().invoke(command, [*arguments, "--rank-pattern", "up_proj"])
    assert refused.exit_code == 2
    assert "is not KEY=NUMBER" in refused.stderr
    halved = CliRunner().invoke(command, [*arguments, "--rank-pattern", "up_proj=2.5"])
    assert "not a whole number" in halved.stderr
    again = CliRunner().invoke(command, arguments)
    assert isinstance(again.exception, LoraEdgeError)
