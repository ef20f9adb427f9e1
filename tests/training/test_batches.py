"""Packing, the head on targets, and orders: the same loss, the same gradient, less work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
)

from lora_edge.errors import UnsupportedModelError
from lora_edge.training import Settings, train
from lora_edge.training.batches import LengthGroups, collate
from lora_edge.training.head import TargetHead, agrees, predicting, target_logits
from lora_edge.training.lora import add_lora
from lora_edge.training.target_trainer import mean_over_all
from lora_edge.training.tokens import IGNORED, TokenizedExample, pack
from tests.support.saving import copy_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=2.0),
    "phi": PhiConfig(**SHAPE),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=264, n_positions=64),
}


def adapted(config: Any, **options: Any) -> Any:
    """A random model with random factors, B included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False  # transformers keeps packed rows apart only without a cache
    wrapped = add_lora(model, Settings(rank=3, **options), "base").eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


def examples() -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for size, prompt in ((9, 4), (7, 1), (12, 10), (5, 2)):
        ids = tuple(torch.randint(264, (size,), generator=generator).tolist())
        made.append(TokenizedExample(ids, (IGNORED,) * prompt + ids[prompt:], 0))
    return made


def summed_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss over all targets, by the model's own forward with the whole head."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits, targets = target_logits(model, inputs, batch["labels"], None)
    return cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_rows_lose_and_learn_what_their_examples_do(family: str) -> None:
    model = adapted(CONFIGS[family])
    rows = pack(examples(), 24)
    assert [len(row.parts) for row in rows] == [2, 2]

    def gradient(batches: list[dict[str, Any]]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = torch.stack([summed_loss(model, batch) for batch in batches]).sum()
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        return float(loss.detach()), torch.cat(grads)

    together, packed = gradient([collate(rows, 0)])
    alone, single = gradient([collate([example], 0) for example in examples()])
    assert together == pytest.approx(alone, rel=1e-5)
    torch.testing.assert_close(packed, single, rtol=1e-3, atol=1e-4 * float(single.abs().max()))
    blind = collate(rows, 0)
    blind["position_ids"] = torch.arange(blind["input_ids"].shape[1]).expand_as(blind["input_ids"])
    leaking, _ = gradient([blind])  # control: one sequence per row
    assert abs(leaking - alone) > 1e-3 * alone


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_head_on_targets_has_the_models_own_loss(family: str, packed: bool) -> None:
    model = adapted(CONFIGS[family])
    head = TargetHead(model)
    batch = collate(pack(examples(), 24) if packed else examples(), 0)
    assert agrees(model, batch, head)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits, targets = target_logits(model, inputs, batch["labels"], head)
    whole, same = target_logits(model, inputs, batch["labels"], None)
    assert torch.equal(targets, same)
    assert len(targets) == sum(example.targets for example in examples())
    torch.testing.assert_close(logits, whole)
    assert model(**inputs).logits.shape[1] == batch["input_ids"].shape[1]  # the hook is off again


def test_a_head_that_takes_something_else_is_computed_whole() -> None:
    model = adapted(CONFIGS["llama"])
    head = TargetHead(model)
    batch = collate(examples(), 0)
    base = model.get_base_model()
    whole = base.lm_head.forward
    base.lm_head.forward = lambda hidden: whole(hidden) - whole(hidden)[:, -1:]
    assert not agrees(model, batch, head)  # what follows is not elementwise
    base.lm_head.forward = whole
    assert agrees(model, batch, head)


def test_prompt_positions_get_no_gradient_through_the_head_on_targets() -> None:
    model = adapted(CONFIGS["llama"])
    head = TargetHead(model)
    batch = collate(examples(), 0)
    labels = batch.pop("labels")
    hidden: list[torch.Tensor] = []

    def keep(_: Any, inputs: tuple[Any, ...]) -> None:
        inputs[0].retain_grad()
        hidden.append(inputs[0])

    base = model.get_base_model()
    base.lm_head.register_forward_pre_hook(keep, prepend=True)
    logits, targets = target_logits(model, batch, labels, head)
    cross_entropy(logits, targets).backward()
    reached = hidden[0].grad.abs().sum(-1) > 0
    assert torch.equal(reached, predicting(labels))
    assert not reached.all()


def test_what_is_said_of_the_prompt_changes_nothing() -> None:
    """Neither the logits at prompt positions nor which tokens stand there as labels."""
    rows = [example for example in examples() if example.labels.count(IGNORED) > 1]
    labels = collate(rows, 0)["labels"]
    logits = torch.randn(*labels.shape, 264, generator=torch.Generator().manual_seed(2))
    keep = predicting(labels)

    def loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
        leaf = logits.clone().requires_grad_()
        loss = mean_over_all(SimpleNamespace(logits=leaf), labels)
        loss.backward()
        return loss.detach(), leaf.grad

    loss, gradient = loss_and_gradient(logits, labels)
    assert torch.all(gradient[~keep] == 0)
    assert torch.all(gradient[keep].abs().sum(-1) > 0)
    moved = logits + torch.where(keep, 0.0, 3.0).unsqueeze(-1) * torch.rand(logits.shape)
    again, same = loss_and_gradient(moved, labels)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, same)
    # The same completions after prompts of other tokens, as long: other labels before the mask.
    others = [
        TokenizedExample(tuple((i + 7) % 264 for i in row.input_ids), row.labels, 0) for row in rows
    ]
    assert torch.equal(collate(others, 0)["labels"], labels)
    moved = logits.clone()
    moved[keep] += torch.rand(moved[keep].shape)  # control
    assert not torch.equal(loss_and_gradient(moved, labels)[0], loss)
    unmasked = collate(rows, 0)["input_ids"]
    assert not torch.equal(loss_and_gradient(logits, unmasked)[0], loss)


@pytest.mark.parametrize("epoch", [0, 1])
def test_groups_of_like_length_are_whole_and_the_same_each_time(epoch: int) -> None:
    lengths = torch.randint(1, 100, (203,), generator=torch.Generator().manual_seed(0)).tolist()

    def order(epoch: int) -> list[int]:
        sampler = LengthGroups(lengths, 8, seed=3)
        sampler.set_epoch(epoch)
        return list(sampler)

    found = order(epoch)
    assert sorted(found) == list(range(203))
    assert found == order(epoch) != order(epoch + 1)

    def padding(indices: list[int]) -> int:
        batches = [indices[start : start + 8] for start in range(0, len(indices), 8)]
        return sum(max(lengths[i] for i in b) * len(b) for b in batches) - sum(lengths)

    assert padding(found) < 0.2 * padding(list(range(203)))


def test_packing_is_refused_where_examples_would_see_each_other(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    blind = tmp_path / "bloom"  # ALiBi: it takes no positions
    config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=264)
    AutoModelForCausalLM.from_config(config).save_pretrained(blind)
    copy_tokenizer(blind)
    with pytest.raises(UnsupportedModelError, match="does not keep packed examples apart"):
        train(blind, data, tmp_path / "a", packing=True, max_length=60)
    assert not list(tmp_path.glob("a*"))
