"""The small reader of JSON Schemas says what jsonschema says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest

import lora_edge.reports
from lora_edge.files.json_schema import unfit

SCHEMA: dict[str, Any] = json.loads(
    Path(lora_edge.reports.__file__).with_name("report.schema.json").read_text(encoding="utf-8")
)


def _example(schema: dict[str, Any]) -> Any:
    """Something that fits."""
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "oneOf" in schema:
        return _example(schema["oneOf"][-1])
    kind = schema["type"] if isinstance(schema["type"], str) else schema["type"][0]
    if kind == "object":
        found = {name: _example(inner) for name, inner in schema.get("properties", {}).items()}
        more = schema.get("additionalProperties")
        return found | ({"more": _example(more)} if isinstance(more, dict) else {})
    if kind == "array":
        return [_example(schema["items"])] * 2
    return {"string": "x", "integer": 3, "number": 0.5, "boolean": True, "null": None}[kind]


def _damaged(random: Random, data: Any) -> Any:
    values: list[Any] = [None, True, 0, -1, 1.5, "x", [], {}, [1], {"a": 1}]
    places: list[tuple[Any, Any]] = []
    level = [data]
    while level:
        each = level.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each))
        places += [(each, key) for key in keys]
        level += [each[key] for key in keys if isinstance(each[key], dict | list)]
    owner, key = random.choice(places)
    if isinstance(owner, dict) and random.random() < 0.3:
        owner[f"{key}x"] = owner.pop(key)
    else:
        owner[key] = random.choice(values)
    return data


def test_agrees_with_jsonschema() -> None:
    whole = _example(SCHEMA)
    assert unfit(whole, SCHEMA) == ""
    theirs = jsonschema.Draft202012Validator(SCHEMA)
    random = Random(0)
    refused = 0
    for _ in range(500):
        data = _damaged(random, copy.deepcopy(whole))
        found = unfit(data, SCHEMA)
        assert (found == "") == theirs.is_valid(data), found
        refused += bool(found)
    assert 250 < refused < 500


def test_says_where_and_what() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer", "maximum": 3}}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert unfit({}, schema) == "it lacks 'a'"
    assert unfit({"a": [1, "x"]}, schema) == "a[1] is 'x', expected integer"
    assert unfit({"a": [4]}, schema) == "a[0] is 4, expected 3 or less"
    assert unfit({"a": [], "b": 1}, schema) == "it has the unknown 'b'"


def test_a_keyword_that_is_not_known_is_not_passed_over() -> None:
    with pytest.raises(TypeError, match="minLength"):
        unfit("x", {"minLength": 3})
