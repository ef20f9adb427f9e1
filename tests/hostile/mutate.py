"""Damage and malice, seeded: of bytes, JSON, lines, templates."""

from __future__ import annotations

import copy
import json
import re
import struct
from random import Random
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 255, 2**31, 2**40, 2**63, 10**30, -(2**63), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "NaN", "a", "x" * 5000, "../../etc/passwd", "..",
    "/etc/passwd", "C:\\x", "\\\\host\\x", "\0", "\ud800", "é\u202e", "(a|aa)+$", "(.*)*(.*)*x",
    "(", "[[:alpha:]]", "{{ 1/0 }}", "lora", "LORA", "true", "1e999", [], [[]], {},
    {"a": {}}, [None], [0], [-1], [2**63], [1, "a"], [0.5], ["a", "a"], list(range(1000)),
    [[[[[[[[]]]]]]]], [True],
    {"a": None}, {"": 0}, {".*": 1}, {"(a|aa)+": 1}, {"../x": "y"},
]  # fmt: skip
TEXTS = [
    b"", b"null", b"[]", b"{}", b"0", b'""', b"{", b"[" * 100_000, b'{"a":' * 5000,
    b"[" * 150 + b"]" * 150, b"\xff\xfe{\x00}\x00", b"\x00" * 64, b"version https://git-lfs.github."
    b"com/spec/v1\noid sha256:00\nsize 12\n", b"<html></html>", b"\x80\x02}q\x00.", b"PK\x03\x04",
]  # fmt: skip


def of_json(random: Random, content: bytes) -> bytes:
    """A JSON text with one or a few faults."""
    if random.random() < 0.25:
        return random.choice(_JSON_TEXT)(random, content)
    data = json.loads(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = _edited(random, data)
    text = json.dumps(data, indent=random.choice((None, 1)), ensure_ascii=random.random() < 0.9)
    return text.encode("utf-8", "surrogatepass")


def _edited(random: Random, data: Any) -> Any:
    places = list(_places(data))
    if not places:
        return random.choice(VALUES)
    # Few keys are at the top, and those decide most.
    owner, key = random.choice(places if random.random() < 0.6 else places[: max(len(data), 1)])
    what = random.randrange(8)
    if what < 4:
        owner[key] = copy.deepcopy(random.choice(VALUES))
    elif what == 4:
        del owner[key]
    elif what == 5 and isinstance(owner, dict):
        owner[random.choice(["x", "", "__class__", f"{key} ", f"{key}s", "../x"])] = owner.pop(key)
    elif what == 6:
        owner[key] = random.choice([[owner[key]], {"a": owner[key]}, str(owner[key])])
    else:
        other, name = random.choice(places)
        owner[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name:])
    return data


def _places(data: Any) -> Any:
    """Every (container, key), the outermost first."""
    level = [data]
    while level:
        inner = []
        for each in level:
            if isinstance(each, dict):
                yield from ((each, key) for key in list(each))
                inner += each.values()
            elif isinstance(each, list):
                yield from ((each, index) for index in range(min(len(each), 50)))
                inner += each[:50]
        level = inner


def _twice(random: Random, content: bytes) -> bytes:
    """A key twice."""
    found = list(re.finditer(rb'("[^"]*")\s*:', content))
    if not found:
        return content + content
    one = random.choice(found)
    return content[: one.start()] + one[1] + b": 1, " + content[one.start() :]


def _nonfinite(random: Random, content: bytes) -> bytes:
    found = list(re.finditer(rb"(?<=[\s:,\[])-?[0-9][0-9.eE+-]*", content))
    if not found:
        return b"[NaN]"
    one = random.choice(found)
    new = random.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000])
    return content[: one.start()] + new + content[one.end() :]


def of_bytes(random: Random, content: bytes) -> bytes:
    """Bytes with one or a few faults."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        if not data:
            break
        at = random.randrange(len(data))
        if random.random() < 0.4:
            at = random.randrange(min(len(data), 64))  # where headers are
        what = random.randrange(8)
        if what == 0:
            data[at] ^= 1 << random.randrange(8)
        elif what == 1:
            data[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif what == 2:
            del data[at:]
        elif what == 3:
            data[at:at] = random.randbytes(random.choice((1, 4, 64)))
        elif what == 4:
            del data[at : at + random.choice((1, 4, 64))]
        elif what == 5:
            size = random.choice((4, 8))
            number = random.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            data[at : at + size] = struct.pack("<Q", number)[:size]
        elif what == 6:
            data += random.choice((b"\0", b"x" * 100, content[:100]))
        else:
            data[at:at] = data[at : at + 200]
    return bytes(data)


_JSON_TEXT = [
    lambda random, _: random.choice(TEXTS),
    lambda random, content: content[: random.randrange(len(content) + 1)],
    of_bytes,
    lambda _, content: b"\xef\xbb\xbf" + content,
    lambda _, content: content.decode("utf-8", "replace").encode("utf-16"),
    _twice,
    _nonfinite,
    lambda random, content: content.replace(b'"', b'"\\ud800', random.choice((1, 3))),
    lambda random, content: content + random.choice((b"x", b"{}", b"\0", b"//")),
]


def of_lines(random: Random, content: bytes) -> bytes:
    """A jsonl file: a line with a fault, or the whole."""
    lines = content.split(b"\n")
    if random.random() < 0.3:
        return of_bytes(random, content)
    at = random.randrange(len(lines))
    if lines[at].startswith(b"{"):
        lines[at] = of_json(random, lines[at]).replace(b"\n", b" ")
    what = random.randrange(10)
    if what == 0:
        lines.insert(at, random.choice((b"", b" ", b"null", b"[1]", b"\xff", b"\x85", b"\x1c")))
    elif what == 1:
        lines = [line + b"\r" for line in lines]
    elif what == 2:
        lines[0] = b"\xef\xbb\xbf" + lines[0]
    return b"\n".join(lines)


_CSV = [
    b'"', b'""', b",", b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"'", b";", b"\t", b"=1+1",
    b"x" * 200_000, b'"' * 5, b"prompt,", b"label", b"\xe2\x80\xa8",
]  # fmt: skip


def of_csv(random: Random, content: bytes) -> bytes:
    """A csv file with a fault."""
    if random.random() < 0.3:
        return of_bytes(random, content)
    for _ in range(random.choice((1, 2, 4))):
        at = random.randrange(len(content) + 1)
        content = content[:at] + random.choice(_CSV) + content[at:]
    return content


TEMPLATES = [
    "{{ 1/0 }}", "{{ 1 % 0 }}", "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}",
    "{{ 'a' * 3000000000 }}", "{{ [1] * 1000000000 }}", "{{ 'a'.center(3000000000) }}",
    "{{ 'a'.ljust(10 ** 10) }}", "{{ '%9999999999d' % 1 }}", "{{ '{:>9999999999}'.format(1) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages.__class__.__mro__ }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ cycler.__init__.__globals__ }}", "{{ 10 ** 10 ** 8 }}", "{{ 9 ** 9 ** 7 }}",
    "{{ messages | tojson(indent=1000000000) }}", "{{ lipsum(n=100000) }}",
    "{{ raise_exception(1) }}", "{{ raise_exception() }}", "{{ strftime_now(5) }}",
    "{{ strftime_now('%Y' * 1000000) }}", "{{ x.y.z }}", "{{ messages[99].content }}",
    "{{ messages['a'] }}", "{% break %}", "{% for", "{{", "{% if %}", "{{ 'a' | nothing }}",
    "{{ 'a' is nothing }}", "{{ f() }}", "{{ 'a'() }}", "{{ (1, 2) | batch(0) | list }}",
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x | length }}",
    "{{ range(10 ** 9) | list | length }}", "{{ 'a' | replace('', 'b' * 100000) | length }}",
    "{{ 'a' | indent(10 ** 10) }}", "{{ 'ab' | wordwrap(0) }}", "{{ 'a' * 10 ** 8 }}",
    "{{ ('a' * 99999) | urlize | length }}", "{{ 'x' | int(base=1) }}", "{{ '1' | int(base='a') }}",
    "{{ messages | sort }}", "{{ messages | sum }}", "{{ messages + 1 }}", "{{ -messages }}",
    "{{ bos_token + 1 }}", "{{ messages | map(attribute='x.y') | list }}", "{{ 1 | round(10**9) }}",
    "{{ 'a'.encode('idna') }}", "{{ '\\ud800' }}", "{{ '\\ud800' | tojson }}", "{{ 'é'.encode() }}",
    "{{ messages.append(1) }}", "{% set messages = 1 %}", "{% do x %}", "{% trans %}x",
    "{{ 'a'.join(range(10 ** 9)) }}", "{{ 'a,' * 99999 }}", "{{ [[]] | tojson(indent='x') }}",
    "{{ ''.join(['x'] * 10 ** 9) }}", "{{ 'x'.zfill(10 ** 10) }}",
    "{{ 'x\\t'.expandtabs(10**10) }}",
    "{{ 'x' | filesizeformat }}", "{{ messages | random }}", "{{ loop }}", "{{ self }}",
    "{{ joiner.__class__ }}", "{{ dict(a=1).__init__ }}", "{{ 'a'.format_map(messages) }}",
    "{{ '{0.__class__}'.format(messages) }}", "{% raw %}", "{# ", "{% generation %}",
    "{% set x %}" * 200, "(" * 3000, "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{% if true %}" * 300 + "{% endif %}" * 300, "{{ [" + "[" * 200 + "]" * 200 + "] }}",
]  # fmt: skip


def of_template(random: Random, content: bytes) -> bytes:
    """A template with something put into it."""
    if random.random() < 0.15:
        return of_bytes(random, content)
    text = content.decode()
    for _ in range(random.choice((1, 1, 2))):
        # Between two tags more often than within one.
        ends = [match.end() for match in re.finditer(r"[%}]}", text)]
        at = random.choice([0, len(text), *ends]) if random.random() < 0.8 else None
        at = random.randrange(len(text) + 1) if at is None else at
        text = text[:at] + random.choice(TEMPLATES) + text[at:]
    return text.encode("utf-8", "surrogatepass")
