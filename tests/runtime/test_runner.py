from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import (
    AdapterNotFoundError,
    BundleError,
    DataError,
    OptionError,
    ProviderError,
)
from lora_edge.runtime import Runner
from lora_edge.runtime.sampling import Sampling

FORMS = ["fused", "portable", "foreign"]
PROMPTS = ["hello there", "a", "漢字 and more of it"]


def greedy(tiny: Any, form: str, prompt: list[int], state: Any, count: int) -> list[int]:
    """New ids by the reference, one whole forward pass a token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(np.argmax(tiny.reference(form, ids, state)[-1])))
        if ids[-1] == tiny.eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("form", FORMS)
def test_logits_keep_the_callers_layout(tiny: Any, runners: dict[str, Runner], form: str) -> None:
    runner, rows = runners[form], tiny.rows(7, 3, 5)
    from_lists = runner.logits(rows, adapter="beta")
    assert from_lists.shape == (3, 7, tiny.vocab)
    assert from_lists.dtype == np.float32
    for side in ("left", "right"):
        ids, mask = np.full((3, 9), 11), np.zeros((3, 9), np.int64)
        for index, row in enumerate(rows):
            span = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
            ids[index, span], mask[index, span] = row, 1
        logits = runner.logits(ids, mask, adapter="beta")
        assert logits.shape == (3, 9, tiny.vocab)
        assert not logits[mask == 0].any()
        np.testing.assert_array_equal(
            logits[mask == 1], np.concatenate([from_lists[i, : len(r)] for i, r in enumerate(rows)])
        )
    expected = tiny.reference(form, rows[1], {"beta": 1.0})
    np.testing.assert_allclose(from_lists[1, :3], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("ids", "mask", "what"),
    [
        ([], None, "the batch is empty"),
        ([[1], []], None, "row 1 has no tokens"),
        (np.zeros((0, 3), int), None, "the batch is empty"),
        ([[1, 2, 3]], [[1, 0, 1]], "mask of row 0 has holes"),
        ([[1, 2, 3]], [[0, 1, 0]], "padded on both sides"),
        ([[1, 2], [1, 2]], [[1, 1], [0, 0]], "row 1 has no tokens"),
        ([[1, 2]], [[1, 2]], "values other than 0 and 1"),
        ([[1, 2]], [[1]], r"input_ids is \[1, 2\] and attention_mask \[1, 1\]"),
        ([[1, 2], [3]], [[1, 1], [1, 0]], "unequal lengths came with an attention mask"),
        ([[1.5, 2.0]], None, "row 0 is 1-dimensional float64, expected a list of integers"),
        ([[1, 264]], None, "token id 264 in row 0 is outside the vocabulary of 264"),
        ([[1] * 97], None, "97 positions were asked for; the model has 96"),
        ([1, 2], None, "row 0 is 0-dimensional"),
    ],
)
def test_bad_ids_and_masks(runners: dict[str, Runner], ids: Any, mask: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        runners["fused"].logits(ids, mask)


@pytest.mark.parametrize("form", FORMS)
def test_greedy_ids_are_the_references(tiny: Any, runners: dict[str, Runner], form: str) -> None:
    runner, rows = runners[form], tiny.rows(9, 2, 5)
    states: list[Any] = ["alpha", None, {"alpha": 0.5, "beta": 1.0}]
    weights: list[Any] = [{"alpha": 1.0}, None, states[2]]
    generated = runner.generate_ids(rows, adapter=states, max_new_tokens=20)
    expected = [greedy(tiny, form, r, w, 20) for r, w in zip(rows, weights, strict=True)]
    assert generated == expected
    for row, state, ids in zip(rows, states, expected, strict=True):
        assert runner.generate_ids([row], adapter=state, max_new_tokens=20) == [ids]
    assert runner.generate_ids(rows, max_new_tokens=20) != expected


def test_a_row_ends_after_its_end_token(runners: dict[str, Runner], tiny: Any) -> None:
    runner, rows = runners["fused"], tiny.rows(9, 2)
    free = runner.generate_ids(rows, max_new_tokens=8)
    ended = Runner(runner.bundle, threads=1)
    ended.__dict__["eos_ids"] = frozenset([free[0][2]])
    short, other = ended.generate_ids(rows, max_new_tokens=8)
    assert short == free[0][: free[0].index(free[0][2]) + 1]
    if free[0][2] in free[1]:
        assert other == free[1][: free[1].index(free[0][2]) + 1]
    else:
        assert other == free[1]


def test_the_loop_ends_when_all_rows_have(
    tiny: Any, runners: dict[str, Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runners["fused"]
    chosen = iter([1, tiny.eos, tiny.eos])  # row 0 ends second, row 1 first
    monkeypatch.setattr(Sampling, "choose", lambda *_: next(chosen))
    assert runner.generate_ids([[1, 2], [3]], max_new_tokens=50) == [[1, tiny.eos], [tiny.eos]]


@pytest.mark.parametrize("form", FORMS)
def test_unequal_prompts_are_completed_as_alone(runners: dict[str, Runner], form: str) -> None:
    runner = runners[form]
    together = runner.generate(PROMPTS, adapter="alpha", max_new_tokens=12)
    alone = [runner.generate(p, adapter="alpha", max_new_tokens=12)[0] for p in PROMPTS]
    assert together == alone
    assert together != runner.generate(PROMPTS, max_new_tokens=12)


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.5, "top_k": 200, "seed": 3}])
@pytest.mark.parametrize("stop", [(), "\ufffd", ["a", "\x06"]])
def test_stream_is_generate(runners: dict[str, Runner], sampled: Any, stop: Any) -> None:
    for form in FORMS:
        for prompt in PROMPTS:
            options = {"adapter": "beta", "max_new_tokens": 30, "stop": stop, **sampled}
            pieces = list(runners[form].stream(prompt, **options))
            assert [*map(bool, pieces)] == [True] * len(pieces)
            assert runners[form].generate([prompt], **options) == ["".join(pieces)]


def test_stop_strings_end_a_row_and_not_its_neighbours(runners: dict[str, Runner]) -> None:
    runner = runners["fused"]
    options: Any = {"max_new_tokens": 40, "temperature": 2.0, "top_k": 0, "seed": 1}
    free = runner.generate(PROMPTS, **options)
    stop = free[0][4:6]
    stopped = runner.generate(PROMPTS, stop=[stop], **options)
    assert stopped == [text.split(stop)[0] for text in free]
    assert stopped[0] != free[0]


def test_seeds(runners: dict[str, Runner]) -> None:
    runner = runners["fused"]
    options: Any = {"max_new_tokens": 16, "temperature": 1.0}
    one = runner.generate(PROMPTS, seed=4, **options)
    assert one == runner.generate(PROMPTS, seed=4, **options)
    assert one[1:] == runner.generate(PROMPTS[1:], seed=4, **options)
    assert one != runner.generate(PROMPTS, seed=5, **options)
    twice = runner.generate([PROMPTS[0]] * 2, seed=4, **options)
    assert twice[0] == one[0]
    assert twice[1] != one[0]


def test_chat_takes_texts_and_conversations(runners: dict[str, Runner]) -> None:
    runner = runners["fused"]
    messages = [{"role": "user", "content": "hi"}]
    one = runner.generate(["hi", messages], chat=True, max_new_tokens=6)
    assert one[0] == one[1]
    assert runner.generate(messages, chat=True, max_new_tokens=6) == one[:1]
    assert "".join(runner.stream(messages, chat=True, max_new_tokens=6)) == one[0]
    ids = runner.tokenizer.encode_chat("hi")
    assert runner.generate_ids([ids], max_new_tokens=6) != runner.generate_ids(
        [runner.tokenizer.encode("hi")], max_new_tokens=6
    )


def test_bad_prompts_say_the_numbers(runners: dict[str, Runner]) -> None:
    runner = runners["fused"]
    with pytest.raises(DataError, match=r"a prompt of 81 tokens and 64 new ones exceed .* 96") as e:
        runner.generate("x" * 80)
    assert "max_new_tokens=15" in e.value.hint
    with pytest.raises(DataError, match="a prompt of 101 tokens") as e:
        runner.generate("x" * 100)
    assert e.value.hint == "Shorten the prompt."
    with pytest.raises(OptionError, match="max_new_tokens is 0, expected 1 or more"):
        runner.generate("x", max_new_tokens=0)
    with pytest.raises(DataError, match="the batch has 0 rows"):
        runner.generate([])
    with pytest.raises(DataError, match="a prompt is list, expected text"):
        runner.generate([[{"role": "user", "content": "x"}]])
    with pytest.raises(DataError, match="temperature is -1"):
        runner.generate("x", temperature=-1)
    # A stream refuses when it is made, not at its first piece.
    with pytest.raises(AdapterNotFoundError):
        runner.stream("x", adapter="gamma")


def test_what_a_runner_tells(runners: dict[str, Runner], tiny: Any) -> None:
    runner = runners["portable"]
    assert runner.adapters == ("alpha", "beta", "readout")
    assert runner.part == tiny.part("portable")
    assert runner.eos_ids == {tiny.eos}
    assert isinstance(Runner(str(runner.bundle.directory), threads=1).bundle, Bundle)


def test_damaged_bundles_are_refused(tiny: Any, bundle: Bundle) -> None:
    with pytest.raises(ProviderError, match="'abacus'"):
        Runner(bundle, provider="abacus")
    with pytest.raises(BundleError, match="is not a bundle"):
        Runner(bundle.directory / "onnx")
    data = bundle.directory / "onnx" / "model.onnx_data"
    data.write_bytes(b"12345")
    cut = tiny.rehash(bundle, "onnx/model.onnx_data")
    Runner(cut, threads=1)
    data.write_bytes(b"1234")
    with pytest.raises(BundleError, match=r"model\.onnx_data is 4 bytes, expected 5"):
        Runner(cut)
    data.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx_data is missing"):
        Runner(cut)
    graph = bundle.directory / "onnx/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.onnx differs from its hash"):
        Runner(bundle)


def test_a_damaged_tokenizer_is_refused_when_used(bundle: Bundle) -> None:
    (bundle.directory / "tokenizer.json").write_text("{}")
    runner = Runner(bundle, threads=1)
    runner.generate_ids([[1]], max_new_tokens=1)
    with pytest.raises(BundleError, match=r"tokenizer\.json differs from its hash"):
        runner.generate("x", max_new_tokens=1)


def test_a_stop_string_ends_the_loop(
    runners: dict[str, Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = iter(runners["fused"].tokenizer.encode("ab#c", special_tokens=False))
    monkeypatch.setattr(Sampling, "choose", lambda *_: next(tokens))
    assert runners["fused"].generate("x", max_new_tokens=50, stop="#") == ["ab"]
    assert len(list(tokens)) == 1
