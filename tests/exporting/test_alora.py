"""Activated LoRA: from its invocation on, the base's cache before it kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lora_edge
from tests.support.kinds import make_kinds

INVOCATION = [7, 9, 11]
PROMPT = [5, 17, 90, *INVOCATION, 3, 44, *INVOCATION, 8]
"""Twice invoked: active from the last time on."""


@pytest.fixture(scope="module", params=["fused", "portable"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("alora")
    base, adapters = make_kinds("llama", root, ("alora", "plain"))
    form: Literal["fused", "portable"] = request.param
    lora_edge.export(base, adapters, output=root / "out", form=form)
    return base, adapters["alora"], root / "out"


@pytest.fixture
def runner(made: tuple[Path, Path, Path]) -> lora_edge.Runner:
    return lora_edge.Runner(made[2])


def _peft(made: tuple[Path, Path, Path]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(made[0], attn_implementation="eager")
    return PeftModel.from_pretrained(model, made[1]).eval()


def test_generates_what_peft_generates(
    made: tuple[Path, Path, Path], runner: lora_edge.Runner
) -> None:
    with torch.inference_mode():
        out = _peft(made).generate(
            input_ids=torch.tensor([PROMPT]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0, len(PROMPT) :].tolist()
    expected = torch.stack(out.logits)[:, 0].numpy()
    decoding = runner.decoder.start(1, 40, runner.binding("alora", 1))
    logits = [decoding.prefill([PROMPT])[0]]
    logits += [decoding.step([token])[0] for token in tokens[:-1]]
    np.testing.assert_allclose(np.stack(logits), expected, atol=1e-5)
    for other in (None, "plain"):
        decoding = runner.decoder.start(1, 40, runner.binding(other, 1))
        assert np.abs(decoding.prefill([PROMPT])[0] - expected[0]).max() > 1e-2


def test_before_the_last_invocation_it_is_the_base(runner: lora_edge.Runner) -> None:
    base, active = (runner.logits([PROMPT], adapter=name)[0] for name in (None, "alora"))
    start = len(PROMPT) - 4
    np.testing.assert_array_equal(base[:start], active[:start])
    assert np.abs(base[start:] - active[start:]).max(-1).min() > 1e-3
    without = [token for token in PROMPT if token not in INVOCATION]
    np.testing.assert_array_equal(
        runner.logits([without], adapter="alora"), runner.logits([without])
    )


def test_rows_of_one_batch_are_invoked_each_at_its_own_place(runner: lora_edge.Runner) -> None:
    rows = [PROMPT, [5, *INVOCATION, 6, 3], [44, 8, 9], [3, *INVOCATION]]
    states = ["alora", "alora", "alora", {"plain": 0.5}]
    mixed = runner.generate_ids(rows, states, 6)
    alone = [runner.generate_ids([row], [s], 6)[0] for row, s in zip(rows, states, strict=True)]
    assert mixed == alone
