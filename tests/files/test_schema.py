"""Schemas: what does not fit is named, with its place, its value and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import pytest

from lora_edge.errors import DataError
from lora_edge.files.schema import FINITE, RelativePath, Sha256, between, decode, sized


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, between(1, 64)]
    mode: Literal["a", "b", 1] = "a"


@dataclass(frozen=True)
class Outer:
    name: Annotated[str, sized(1, 5)]
    inner: Inner
    parts: Mapping[str, tuple[Inner, ...]]
    pair: tuple[str, float] = ("", 0.0)
    either: int | str | None = None
    scale: Annotated[float, FINITE] = 1.0
    flag: bool = False
    file: RelativePath = "x"
    digest: Sha256 = "0" * 64
    anything: Any = None


class Foreign(TypedDict, total=False):
    r: int
    names: str | list[str] | None


WHOLE: dict[str, Any] = {
    "name": "x",
    "inner": {"size": 3},
    "parts": {"p": [{"size": 1, "mode": "b"}]},
    "pair": ["y", 2],
    "either": "z",
    "file": "a/b.json",
}


def test_decodes_nested_dataclasses() -> None:
    assert decode(Outer, WHOLE, "f", DataError, "h") == Outer(
        "x", Inner(3), {"p": (Inner(1, "b"),)}, ("y", 2.0), "z", file="a/b.json"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": 3}, "name is 3, expected a text"),
        ({"name": ""}, "name is '', expected 1 to 5"),
        ({"inner": []}, r"inner is \[\], expected an object"),
        ({"inner": {}}, "inner.size is missing"),
        ({"inner": {"size": 0}}, "inner.size is 0, expected 1 to 64"),
        ({"inner": {"size": True}}, "inner.size is True, expected a whole number"),
        ({"inner": {"size": 2.0}}, "inner.size is 2.0, expected a whole number"),
        ({"inner": {"size": 2, "sise": 2}}, "inner.sise is no field"),
        ({"inner": {"size": 2, "mode": "c"}}, "inner.mode is 'c', expected 'a' or 'b' or 1"),
        ({"inner": {"size": 2, "mode": True}}, "inner.mode is True"),
        ({"inner": {"size": 2, "mode": []}}, "inner.mode is"),
        ({"parts": {"p": {}}}, "parts.p is {}, expected a list"),
        ({"parts": {"p": [{"size": 1}, {"size": 99}]}}, r"parts.p\[1\].size is 99"),
        ({"pair": ["y"]}, "pair is .*, expected a list of 2"),
        ({"pair": ["y", "z"]}, r"pair\[1\] is 'z', expected a number"),
        ({"pair": ["y", 10**400]}, r"pair\[1\] is 1000"),
        ({"either": 1.5}, "either is 1.5"),
        ({"scale": float("nan")}, "scale is nan, expected a finite number"),
        ({"flag": 0}, "flag is 0, expected true or false"),
        ({"digest": "A" * 64}, "digest is .*, expected 64 hexadecimal"),
        ({"nothing": 1}, "nothing is no field"),
    ],
)
def test_names_what_does_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        decode(Outer, {**WHOLE, **changes}, "f.json", DataError, "Copy it again.")
    assert str(caught.value).startswith("f.json: ")
    assert caught.value.hint == "Copy it again."


@pytest.mark.parametrize(
    "path",
    ["/a", "../a", "a/../b", "a/./b", "a//b", "a/", "", ".", "C:a", "C:/a", "a\\b", "\\\\h\\s",
     "a\0b", "a\nb", "x" * 256, "é" * 128, "x/" * 600 + "x"],
)  # fmt: skip
def test_refuses_paths_that_lead_out(path: str) -> None:
    with pytest.raises(DataError, match=r"file is .*, expected a relative path"):
        decode(Outer, {**WHOLE, "file": path}, "f.json", DataError, "h")


def test_a_foreign_file_may_hold_more() -> None:
    data = {"r": 4, "names": ["a"], "other": {"x": 1}}
    assert decode(Foreign, data, "f", DataError, "h") == data
    for wrong in ({"r": "4"}, {"names": [1]}, {"names": {}}):
        with pytest.raises(DataError, match="expected"):
            decode(Foreign, {**data, **wrong}, "f", DataError, "h")


def test_another_type_for_a_field() -> None:
    data = {**WHOLE, "inner": {"r": 1}}
    found = decode(Outer, data, "f", DataError, "h", inner=Foreign)
    assert found.inner == {"r": 1}
