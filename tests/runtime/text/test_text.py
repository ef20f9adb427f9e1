from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_edge.runtime.text.text import TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def decode_words(ids: Sequence[int]) -> str:
    """As SentencePiece: words begin with a space, and a text loses its first one."""
    return "".join(f" w{i}" for i in ids).removeprefix(" ")


def pieces(
    ids: Sequence[int], stop: Sequence[str] = (), decode: Callable[..., str] = decode_bytes
) -> list[str]:
    stream = TextStream(decode, stop)
    out = []
    for token in ids:
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.close()]


def test_characters_come_whole() -> None:
    text = "aé漢😀z"
    assert pieces(text.encode()) == [
        *("a", "", "é", "", "", "漢", "", "", "", "😀", "z"),
        "",
    ]


def test_a_cut_off_character_comes_at_the_end() -> None:
    assert pieces("né".encode()[:-1]) == ["n", "", "\ufffd"]


def test_words_keep_their_spaces() -> None:
    assert pieces([1, 2, 3], decode=decode_words) == ["w1", " w2", " w3", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("one EN", ["END"], "one EN"),
        ("ENEND", ["END"], "EN"),
        ("ENDone", ["END"], ""),
        ("a\n\nb", ["\n\n", "b"], "a"),
        ("aXbY", ["bY", "Xb"], "a"),
        ("né!", ["é"], "n"),
        ("plain", [""], "plain"),
    ],
)
def test_stop_strings(text: str, stop: list[str], expected: str) -> None:
    found = pieces(text.encode(), stop)
    assert "".join(found) == expected
    assert found[-1] == "" or expected == text


def test_nothing_is_given_that_a_stop_string_may_take_back() -> None:
    assert pieces(b"a#b##", ["##"])[:4] == ["a", "", "#b", ""]


@given(text=st.text(max_size=20), stop=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_the_concatenation_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    found = "".join(pieces(text.encode("utf-8", errors="replace"), stop))
    whole = text.encode("utf-8", errors="replace").decode()
    assert whole.startswith(found)
    assert not any(s in found for s in stop)
    if found != whole:
        assert any(whole[len(found) :].startswith(s) for s in stop)


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(decode_bytes, ["b"])
    assert [stream.push(token) for token in b"abc"] == ["a", "", ""]
    assert stream.close() == ""
