"""Names that every file system takes."""

from __future__ import annotations

import pytest

from lora_edge.errors import AdapterError
from lora_edge.files.portable import check_apart, unportable


@pytest.mark.parametrize("name", ["con", "Con.txt", "COM0", "lpt¹", "nul .x", "CONIN$", "aux.a.b"])
def test_devices_of_windows(name: str) -> None:
    assert unportable(name)


@pytest.mark.parametrize("name", ["a.", "a ", "a:b", "a\x07", "é", "e\u0301", "a/b", "a|b", "com²"])
def test_what_not_every_system_keeps(name: str) -> None:
    assert unportable(name)


@pytest.mark.parametrize("name", ["a", "console", "com", "com10", "nulla", "a.b-c_d", "x.con", "A"])
def test_what_every_system_keeps(name: str) -> None:
    assert unportable(name) == ""


def test_names_that_differ_in_case_are_told_apart_from_equal_ones() -> None:
    check_apart("a", ["a", "b"], AdapterError)
    with pytest.raises(AdapterError, match="'A' and 'a' differ in case only"):
        check_apart("a", ["b", "A"], AdapterError)
