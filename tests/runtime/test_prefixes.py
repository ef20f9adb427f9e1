"""A prompt that begins like an earlier one under the same adapters runs its rest; no other does.

Logits are compared with a Runner that keeps nothing; a prompt in two parts is added up in another
order than the whole, which is what LIMIT allows for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import DataError
from lora_edge.runtime import Runner, prefixes
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.decoding import Chunk, Decoding
from lora_edge.runtime.generation import Steps
from lora_edge.runtime.prefixes import BLOCK, Prefixes
from lora_edge.runtime.sampling import Sampling
from lora_edge.runtime.session import Fixed

FORMS = ["fused", "portable", "foreign"]
LIMIT = 1e-5
ROOM = 1 << 20
BYTES = 2 * 2 * 2 * 8 * 4 * BLOCK
"""Of a block: keys and values of 2 layers, 2 heads of 8 float32."""
INVOCATION = (251, 252)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """How many tokens of each row were run, but for steps in place."""
    counts: list[tuple[int, ...]] = []
    plain = Decoding._run

    def run(self: Any, io: Any, chunk: Chunk, every: bool) -> Any:
        counts.append(tuple(chunk.counts))
        return plain(self, io, chunk, every)

    monkeypatch.setattr(Decoding, "_run", run)
    return counts


@pytest.fixture(scope="module")
def activated(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Bundles whose ``alpha`` begins at its invocation."""
    made = {}
    for form in FORMS:
        bundle = tiny.bundle(tmp_path_factory.mktemp("activated") / form, form)
        entries = dict(bundle.manifest.adapters)
        entries["alpha"] = replace(entries["alpha"], invocation=INVOCATION, alone="aLoRA")
        part = replace(bundle.manifest.parts["decoder"], head="lm_head")
        manifest = replace(bundle.manifest, adapters=entries, parts={"decoder": part})
        made[form] = bundle.write_manifest(manifest)
    return made


def opened(bundle: Bundle, prefix_bytes: int = ROOM) -> Runner:
    return Runner(bundle, threads=1, prefix_bytes=prefix_bytes)


def steps(runner: Runner, rows: Sequence[Sequence[int]], adapter: Any, count: int = 1) -> Steps:
    return runner._generation(rows, adapter, (Sampling(), count), None)._decoding


def logits(runner: Runner, rows: Sequence[Sequence[int]], adapter: Any = None) -> np.ndarray:
    return steps(runner, rows, adapter).prefill(rows).copy()


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapter", [None, "alpha", {"alpha": 0.5, "beta": -1.2}])
def test_the_rest_alone_is_run_and_gives_the_same(
    tiny: Any, bundles: Any, ran: list[Any], form: str, adapter: Any
) -> None:
    runner, plain = opened(bundles[form]), Runner(bundles[form], threads=1)
    (prompt, other) = tiny.rows(50, 9)
    said = runner.generate_ids([prompt], adapter, 20)
    assert ran[0] == (50,)
    assert said == plain.generate_ids([prompt], adapter, 20)
    whole = prompt + said[0]
    # What it said is run with the next prompt, and kept by that.
    for again, rest in (
        ([*prompt[:40], *other], 17),
        ([*whole[:69], *other], 30),
        (whole[:66], 2),
        (whole[:65], 17),  # never one token alone
        (prompt[:17], 17),
        (prompt[:BLOCK], BLOCK),
        (prompt[:1], 1),
    ):
        ran.clear()
        found = logits(runner, [again], adapter)
        assert ran == [(rest,)]
        close(found, logits(plain, [again], adapter))
        new = [prompt[:40] + other]
        assert runner.generate_ids(new, adapter, 9) == plain.generate_ids(new, adapter, 9)


def test_what_steps_have_made_is_not_kept(tiny: Any, bundles: Any) -> None:
    """One token alone is computed by other kernels than several."""
    runner, rows = opened(bundles["fused"]), tiny.rows(50)
    runner.generate_ids(rows, None, 40)
    assert runner.resident().prefixes == 3 * BYTES


def test_nothing_is_kept_unless_it_is_asked_for(tiny: Any, bundles: Any, ran: list[Any]) -> None:
    runner = Runner(bundles["fused"], threads=1)
    rows = tiny.rows(50)
    assert isinstance(steps(runner, rows, None), Decoding)
    for _ in range(2):
        ran.clear()
        runner.generate_ids(rows, None, 1)
        assert ran == [(50,)]
    assert (runner.resident().prefixes, runner.resident().prefix_limit) == (0, 0)


STATES: list[Any] = [None, "alpha", {"alpha": 0.5}, "beta", {"alpha": 1, "beta": 1}]


@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(range(len(STATES)), 2)])
def test_no_other_adapters_prefix_is_used(
    tiny: Any, bundles: Any, ran: list[Any], monkeypatch: pytest.MonkeyPatch, one: int, other: int
) -> None:
    rows = tiny.rows(50)
    wanted = logits(Runner(bundles["fused"], threads=1), rows, STATES[other])
    runner = opened(bundles["fused"])
    logits(runner, rows, STATES[one])
    ran.clear()
    np.testing.assert_array_equal(logits(runner, rows, STATES[other]), wanted)
    assert ran == [(50,)]
    # If it were, it would show.
    real = prefixes.digests
    monkeypatch.setattr(prefixes, "digests", lambda row, *_: real(row, (), {}))
    runner = opened(bundles["fused"])
    logits(runner, rows, STATES[one])
    ran.clear()
    wrong = logits(runner, rows, STATES[other])
    assert ran == [(2,)]
    assert np.abs(wrong - wanted).max() > 100 * LIMIT


def test_another_order_of_a_blend_is_the_same(tiny: Any, bundles: Any, ran: list[Any]) -> None:
    runner, rows = opened(bundles["fused"]), tiny.rows(50)
    logits(runner, rows, {"alpha": 0.5, "beta": 2})
    logits(runner, rows, {"beta": 2.0, "alpha": np.float32(0.5), "readout": 0})
    assert ran == [(50,), (2,)]


@pytest.mark.parametrize("forgets", [True, False])
def test_an_override_ends_it(
    tiny: Any, bundles: Any, ran: list[Any], monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    """Also where nothing is thrown away: what was kept under other tensors is not found."""
    if not forgets:
        monkeypatch.setattr(Prefixes, "forget", lambda _: None)
    runner, plain = opened(bundles["fused"]), Runner(bundles["fused"], threads=1)
    rows = tiny.rows(50)
    tensors = tiny.tensors({p: f._replace(B=2 * f.B) for p, f in tiny.adapters["alpha"].items()})
    before = logits(runner, rows, "alpha")
    streaming = steps(runner, rows, "alpha", 40)
    for each in (runner, plain):
        each.override("alpha", tensors)
    assert (runner.resident().prefixes == 0) is forgets
    # What was begun before goes on as it was, and neither takes nor leaves anything.
    ran.clear()
    np.testing.assert_array_equal(streaming.prefill(rows), before)
    for token in range(20):
        streaming.advance([token])
    assert ran[0] == (50,)
    assert (runner.resident().prefixes == 0) is forgets
    ran.clear()
    found = logits(runner, rows, "alpha")
    assert ran == [(50,)]
    np.testing.assert_array_equal(found, logits(plain, rows, "alpha"))
    assert np.abs(found - before).max() > 100 * LIMIT
    runner.override("alpha", None)
    ran.clear()
    np.testing.assert_array_equal(logits(runner, rows, "alpha"), before)
    np.testing.assert_allclose(logits(runner, rows, "alpha"), before, rtol=0, atol=LIMIT)
    assert ran == [(50,), (2,)]


def test_the_bytes_are_bounded_and_the_longest_unused_go_first(
    tiny: Any, bundles: Any, ran: list[Any]
) -> None:
    runner = opened(bundles["fused"], 7 * BYTES + 5)
    a, b, c = (tiny.rows(50, seed=seed) for seed in range(3))
    for rows, blocks in ((a, 3), (b, 6), (a, 6), (c, 7)):
        runner.generate_ids(rows, None, 1)
        assert runner.resident().prefixes == blocks * BYTES
    assert runner.resident().prefix_limit == 7 * BYTES + 5
    assert runner.resident().total >= 7 * BYTES
    assert ran == [(50,), (50,), (2,), (50,)]
    # Of b the end went: without its beginning nothing of it would be found.
    assert [_kept(runner, rows[0]) for rows in (a, b, c)] == [3, 1, 3]
    ran.clear()
    for rows in (c, a, b):
        runner.generate_ids(rows, None, 1)
    assert ran == [(2,), (2,), (34,)]


def _kept(runner: Runner, row: Sequence[int]) -> int:
    """How many of a row's blocks are found, which leaves everything as it is."""
    held = set(runner._prefixes.blocks._entries)
    found = prefixes.digests(row, (), {})
    keys = [(runner._active.generation, prefixes._ANY_GRAPH, digest) for digest in found]
    return next((n for n, key in enumerate(keys) if key not in held), len(keys))


def test_of_a_row_that_does_not_fit_the_beginning_is_kept(
    tiny: Any, bundles: Any, ran: list[Any]
) -> None:
    rows = tiny.rows(50)
    runner = opened(bundles["fused"], 2 * BYTES)
    said = runner.generate_ids(rows, None, 40)
    assert (runner.resident().prefixes, _kept(runner, rows[0])) == (2 * BYTES, 2)
    ran.clear()
    assert runner.generate_ids(rows, None, 40) == said
    assert ran[0] == (18,)
    runner = opened(bundles["fused"], BYTES - 1)
    assert runner.generate_ids(rows, None, 40) == said
    assert runner.resident().prefixes == 0


@pytest.mark.parametrize("form", FORMS)
def test_an_alora_and_the_base_share_what_is_before_the_invocation(
    tiny: Any, activated: Any, ran: list[Any], form: str
) -> None:
    first, last = tiny.rows(40, 20)
    invoked, base = [*first, *INVOCATION, *last], [*first, *last, *last]
    plain = Runner(activated[form], threads=1)
    for one, other in (((base, None), (invoked, "alpha")), ((invoked, "alpha"), (base, None))):
        runner = opened(activated[form])
        logits(runner, [one[0]], one[1])
        ran.clear()
        row, adapter = other
        found = logits(runner, [row], adapter)
        assert ran == [(len(row) - 32,)]
        close(found, logits(plain, [row], adapter))
        assert runner.generate_ids([row], adapter, 9) == plain.generate_ids([row], adapter, 9)
    assert np.abs(logits(plain, [invoked], "alpha") - logits(plain, [invoked])).max() > 0.1


@pytest.mark.parametrize("form", ["fused", "portable"])  # the other sees 7 tokens back only
def test_what_follows_an_invocation_is_the_aloras_own(
    tiny: Any, activated: Any, ran: list[Any], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """And the base's again where the invocation comes once more; it is active from the last on."""
    first, middle, last = tiny.rows(20, 30, 9)
    row = [*first, *INVOCATION, *middle]
    more = [*row, *INVOCATION, *last]
    plain = Runner(activated[form], threads=1)
    cases: list[Any] = [(row, "alpha", 4), (row, None, 36), (more, "alpha", 47)]
    for again, adapter, rest in cases:
        runner = opened(activated[form])
        logits(runner, [row], "alpha")
        ran.clear()
        found = logits(runner, [again], adapter)
        assert ran == [(rest,)]
        close(found, logits(plain, [again], adapter))
    # If it were taken for the base's, it would show.
    monkeypatch.setattr(prefixes, "invoked_at", lambda *_: 1 << 40)
    for again, adapter, _ in cases[1:]:
        runner = opened(activated[form])
        logits(runner, [row], "alpha")
        wrong = logits(runner, [again], adapter)
        assert np.abs(wrong - logits(plain, [again], adapter)).max() > 100 * LIMIT


def test_an_invocation_inside_a_block(tiny: Any, activated: Any, ran: list[Any]) -> None:
    """Two rows of the same tokens, active from unlike tokens of one block."""
    plain, runner = Runner(activated["fused"], threads=1), opened(activated["fused"])
    first, last = tiny.rows(34, 20)
    once = [*first, *INVOCATION, 1, 2, 3, *INVOCATION, *last]
    real = [*first, *INVOCATION, 1, 2, 3, 9, 9, *last]
    for row, rest in ((once, 61), (real, 29), (once, 13)):
        ran.clear()
        close(logits(runner, [row], "alpha"), logits(plain, [row], "alpha"))
        assert ran[0] == (rest,)


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_unlike_prefixes(tiny: Any, activated: Any, ran: list[Any], form: str) -> None:
    """None, some, and all but 2 tokens of a prompt; of unlike adapters; of unlike lengths."""
    a, b, c, new = tiny.rows(50, 40, 34, 12, seed=5)
    rows = [a, [*b[:20], *new], new, c, [*b[:35], *INVOCATION, *new]]
    states: list[Any] = ["beta", None, "beta", {"beta": 0.5}, "alpha"]
    runner, plain = opened(activated[form]), Runner(activated[form], threads=1)
    logits(runner, [a, b, [3, 4], c, b[:35]], states)
    ran.clear()
    batch, alone = steps(runner, rows, states, 30), steps(plain, rows, states, 30)
    close(batch.prefill(rows), alone.prefill(rows))
    rests = [2, 16, 12, 2, 17]
    if form == "fused":  # which takes one row at a time behind a past
        assert ran[:5] == [(count,) for count in rests]
    if form == "portable":
        assert ran[0] == tuple(rests)
    rng = np.random.default_rng(0)
    for step in range(29):
        tokens: list[Any] = rng.integers(0, 256, len(rows)).tolist()
        tokens = [None if step % 3 == 1 and row < 2 else x for row, x in enumerate(tokens)]
        found, wanted = batch.advance(tokens), alone.advance(tokens)
        going = [row for row, token in enumerate(tokens) if token is not None]
        close(found[going], wanted[going])
    said = runner.generate_ids(rows, states, 20)
    assert said == plain.generate_ids(rows, states, 20)


def test_adapters_beside_others_are_kept_apart(tiny: Any, bundles: Any, ran: list[Any]) -> None:
    """They are added up in another order there; the base is what it is everywhere."""
    runner, prompt = opened(bundles["fused"]), tiny.rows(50)[0]
    runs: list[tuple[Any, int]] = [
        *(("alpha", 50), (None, 50), (["alpha", None], 2), ([None, "alpha"], 2)),
        *((["alpha", "beta"], 50), (["beta", "alpha"], 2), ([None, "alpha", "beta"], 2)),
        *(("alpha", 2), ("beta", 50), ([{"alpha": 1, "beta": 1}, None], 50)),
    ]
    for states, rest in runs:
        ran.clear()
        logits(runner, [prompt] * (len(states) if isinstance(states, list) else 1), states)
        assert max(map(max, ran)) == rest, states


def test_rows_alike_in_one_batch_keep_their_beginning_once(tiny: Any, bundles: Any) -> None:
    runner = opened(bundles["fused"])
    prompt = tiny.rows(50)[0]
    logits(runner, [prompt] * 4, "alpha")
    assert runner.resident().prefixes == 3 * BYTES
    logits(runner, [prompt, prompt], ["alpha", None])
    assert runner.resident().prefixes == 6 * BYTES


@pytest.mark.parametrize("room", [ROOM, 12 * BYTES])
def test_threads_get_their_own_results(tiny: Any, bundles: Any, room: int) -> None:
    """Also where what is kept goes all the time."""
    plain, runner = Runner(bundles["fused"], threads=1), opened(bundles["fused"], room)
    begin = tiny.rows(40, 40)
    jobs: list[tuple[list[list[int]], Any]] = []
    for n in range(32):
        rows = [begin[n % 2][: 17 + n] + tiny.rows(3 + n % 5, seed=n)[0], *tiny.rows(5, seed=n)]
        jobs.append((rows[: 1 + n % 2], ["alpha", "beta", None][n % 3]))
    expected = [plain.generate_ids(rows, name, 20) for rows, name in jobs]

    def run(job: tuple[list[list[int]], Any]) -> list[list[int]]:
        found = runner.generate_ids(*job, 20)
        assert runner.resident().prefixes <= room
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, jobs)) == expected
    assert runner.resident().prefixes > 0


def test_texts_samples_stops_and_chats_are_the_same(bundles: Any, ran: list[Any]) -> None:
    runner, plain = opened(bundles["fused"]), Runner(bundles["fused"], threads=1)
    text = "Those that begin alike are read once"
    chat = [{"role": "user", "content": text}]
    cases: list[tuple[Any, dict[str, Any]]] = [
        ([text, text, text[:20]], {}),
        ([text, text[:30]], {"temperature": 1.5, "seed": 3, "top_k": 20}),
        ([text], {"repetition_penalty": 1.3}),
        ([chat, [*chat, {"role": "assistant", "content": "Yes."}]], {"chat": True}),
    ]
    for prompts, options in cases:
        wanted = plain.generate(prompts, "beta", 20, **options)
        stop = wanted[0][3:5]
        stopped = plain.generate(prompts, "beta", 20, stop=stop, **options)
        assert stopped != wanted
        for _ in range(2):
            ran.clear()
            assert runner.generate(prompts, "beta", 20, **options) == wanted
            assert runner.generate(prompts, "beta", 20, stop=stop, **options) == stopped
            assert "".join(runner.stream(prompts[0], "beta", 20, **options)) == wanted[0]
        assert max(map(max, ran)) <= BLOCK + 5  # everything was found


def test_a_stream_that_is_left_has_kept_what_it_read(bundles: Any, ran: list[Any]) -> None:
    runner, text = opened(bundles["fused"]), "Those that begin alike are read once"
    stream = runner.stream(text, "beta", 20)
    assert runner.resident().prefixes == 0
    next(stream)
    del stream
    assert runner.resident().prefixes == 2 * BYTES
    ran.clear()
    next(runner.stream(text, "beta", 20))
    assert ran[0] == (len(text) + 1 - 32,)


def test_a_merged_bundle(tiny: Any, bundles: Any, ran: list[Any]) -> None:
    runner, rows = opened(bundles["merged"]), tiny.rows(50)
    wanted = logits(runner, rows)
    close(logits(runner, rows, "alpha"), wanted)
    assert ran == [(50,), (2,)]


def test_sessions_with_other_weights_share_nothing(
    tiny: Any, tmp_path: Path, ran: list[Any]
) -> None:
    import onnx

    path = tmp_path / "base.onnx"
    onnx.save(tiny.graph("fused", sites=False), path)
    one, two, shared, pinned = (
        tiny.decoder(path, "fused", sites=False, threads=1, **fixed)
        for fixed in ({}, {}, {"fixed": Fixed((), {})}, {"fixed": Fixed((), {})})
    )
    kept, rows = Prefixes(ROOM, {}, lambda: 0), tiny.rows(50)

    def run(decoder: Decoder) -> Any:
        kept.reused(decoder.start(1, 60), 0).prefill(rows)
        return ran.pop()

    assert [run(x) for x in (one, two, one)] == [(50,), (2,), (2,)]
    assert [run(x) for x in (shared, pinned, shared, pinned)] == [(50,), (50,), (2,), (2,)]


@pytest.mark.parametrize("form", FORMS)
def test_where_it_cannot_be_kept_nothing_changes(
    tiny: Any, bundles: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """What reads a context, or has its cache in a device's memory."""
    runner = opened(bundles[form])
    kept = runner._prefixes
    heard = runner.decoder.start(1, 60, context={"states": object()})
    assert kept.reused(heard, 0) is heard
    assert isinstance(steps(runner, tiny.rows(5), None), prefixes._Reused)
    monkeypatch.setattr(Decoder, "pools", False)
    assert isinstance(steps(runner, tiny.rows(5), None), Decoding)


def test_what_is_refused_is_refused_alike(tiny: Any, bundles: Any) -> None:
    runner, plain = opened(bundles["fused"]), Runner(bundles["fused"], threads=1)
    good = tiny.rows(50)[0]
    logits(runner, [good])
    for rows in ([[*good, tiny.vocab]], [[*good, 1 << 80]], [good, []], [good * 2]):
        said = []
        for each in (runner, plain):
            with pytest.raises(DataError) as caught:
                each.generate_ids(rows, None, 4)
            said.append(str(caught.value))
        assert said[0] == said[1]
    direct = runner.decoder.start(2, 60)
    with pytest.raises(DataError, match="1 rows were given"):
        runner._prefixes.reused(direct, 0).prefill([good])
    block = np.zeros((4, 2, 48, 8), np.float32)
    small: Any = runner.decoder.start(1, 20)
    with pytest.raises(DataError, match="more than the 20"):
        small.resume([good], [[block]])
