"""Reports from files."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from lora_edge.errors import DataError
from lora_edge.files.json import parse_object, read_json
from lora_edge.files.json_schema import unfit

SCHEMA_VERSION = 2

Data = dict[str, Any]
"""A report as JSON, as ``report.schema.json`` describes it."""


def load_report(path: str | os.PathLike[str]) -> Data:
    """Read what ``validate --json`` wrote.

    Raises:
        DataError: the file is missing, is no report, or one of another version.
    """
    hint = "Write one with: lora-edge validate BUNDLE --json FILE"
    data = read_json(Path(path), DataError, hint)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        found = "no report" if version is None else f"a report of version {version}"
        raise DataError(f"{os.fspath(path)} is {found}, expected version {SCHEMA_VERSION}", hint)
    return described(data, "report.schema.json", f"{os.fspath(path)} is no whole report", hint)


def described(data: Any, schema: str, fault: str, hint: str) -> Data:
    """Data that a JSON schema of this folder describes.

    Args:
        data: of a JSON file.
        schema: the schema's file.
        fault: what is wrong where it does not fit, for people; followed by the place.
        hint: what to do then.

    Raises:
        DataError: it does not fit.
    """
    text = files("lora_edge.reports").joinpath(schema).read_bytes()
    found = unfit(data, parse_object(text, schema, DataError, hint))
    if found:
        raise DataError(f"{fault}: {found}", hint)
    return dict(data)
