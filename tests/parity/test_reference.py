"""The reference is PEFT's own forward: exact sums for blends, no trace left by a state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import Base
from lora_edge.errors import BaseModelError, OptionError
from lora_edge.parity.plan.states import BASE, only, state_of
from lora_edge.parity.reference import Reference

ROWS = [(5, 17, 90, 3, 44, 101), (9, 2, 71)]


@pytest.fixture(scope="module")
def reference(base: Base, adapters: dict[str, Path]) -> Reference:
    made = Reference(base)
    for name, directory in adapters.items():
        made.attach(name, directory)
    return made


def _logits(reference: Reference, adapter: str | dict[str, float] | None) -> np.ndarray:
    state = state_of(adapter)
    return np.concatenate(reference.logits(ROWS, [state] * len(ROWS)))


def test_each_state_differs_and_leaves_no_trace(reference: Reference) -> None:
    before = _logits(reference, None)
    seen = [_logits(reference, name) for name in ("narrow", "rooted", "varied")]
    assert np.array_equal(before, _logits(reference, None))
    assert np.array_equal(seen[-1], _logits(reference, "varied"))  # still set, and was off
    assert np.array_equal(seen[0], _logits(reference, "narrow"))
    for index, one in enumerate(seen):
        for other in [before, *seen[:index]]:
            assert np.abs(one - other).max() > 0.1


def test_base_state_is_the_untouched_model(reference: Reference, base: Base) -> None:
    bare = Reference(base)
    assert np.array_equal(_logits(reference, None), _logits(bare, None))


def test_a_blend_is_the_weighted_sum_of_deltas(
    reference: Reference, base: Base, adapters: dict[str, Path]
) -> None:
    """Against the weights themselves: base + 0.7 ΔW(a) + 0.3 ΔW(b), loaded into a plain model."""
    import torch
    from transformers import AutoModelForCausalLM

    def merged(parts: dict[str, float]) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(base.directory, attn_implementation="eager")
        modules = dict(model.named_modules())
        with torch.inference_mode():
            for name, weight in parts.items():
                for path, module in load_adapter(adapters[name], name).modules.items():
                    delta = weight * module.scaling * (module.b.astype(np.float64) @ module.a)
                    modules[path].weight += torch.from_numpy(delta).float()
            return np.concatenate(
                [model(input_ids=torch.tensor([row])).logits[0].numpy() for row in ROWS]
            )

    blend = {"varied": 0.7, "rooted": 0.3}
    actual = _logits(reference, blend)
    assert np.abs(actual - merged(blend)).max() < 2e-5
    assert np.abs(actual - merged({"varied": 0.3, "rooted": 0.7})).max() > 0.1
    assert np.abs(_logits(reference, "rooted") - merged({"rooted": 1.0})).max() < 2e-5


def test_wide_changes_the_noise_only(reference: Reference) -> None:
    narrow = _logits(reference, "rooted")
    with reference.wide():
        wide = _logits(reference, "rooted")
    assert wide.dtype == np.float64
    assert narrow.dtype == np.float32
    assert 0 < np.abs(narrow - wide).max() < 1e-4
    assert np.array_equal(narrow, _logits(reference, "rooted"))


def test_rows_may_have_states_of_their_own(reference: Reference) -> None:
    mixed = reference.logits(ROWS, [BASE, only("varied")])
    alone = reference.logits(ROWS[:1], [BASE]) + reference.logits(ROWS[1:], [only("varied")])
    for one, other in zip(mixed, alone, strict=True):
        assert np.array_equal(one, other)


def test_greedy_follows_the_full_forward(reference: Reference) -> None:
    state = only("rooted")
    for row, found in zip(ROWS, reference.greedy(ROWS, state, 6), strict=True):
        whole = reference.logits([(*row, *found.tokens[:-1])], [state])[0][len(row) - 1 :]
        assert tuple(whole.argmax(-1)) == found.tokens
        best = np.sort(whole, axis=-1)
        assert np.allclose(best[:, -1] - best[:, -2], found.margins, atol=1e-4)


def test_a_folder_that_transformers_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        Reference(Base(tmp_path, "broken", {}))


def test_a_reference_with_adapters_is_no_base(reference: Reference) -> None:
    with pytest.raises(OptionError, match="has adapters already") as caught:
        _ = reference.bare
    assert "base's folder" in caught.value.hint


def test_the_weights_are_cast_once_for_all_rows(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    casts = []
    model = type(reference._shared)
    original = model.double
    monkeypatch.setattr(model, "double", lambda own: casts.append(own) or original(own))
    before = _logits(reference, "narrow")
    with reference.wide():
        wide = [_logits(reference, name) for name in ("narrow", None, "narrow")]
    assert len(casts) == 1
    assert wide[0].dtype == np.float64
    np.testing.assert_array_equal(wide[0], wide[2])
    np.testing.assert_array_equal(_logits(reference, "narrow"), before)
