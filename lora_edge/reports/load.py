"""Reports from files."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from lora_edge.errors import DataError

SCHEMA_VERSION = 2

Data = dict[str, Any]
"""A report as JSON, as ``report.schema.json`` describes it."""


def load_report(path: str | os.PathLike[str]) -> Data:
    """Read what ``validate --json`` wrote.

    Raises:
        DataError: the file is missing, is no report, or one of another version.
    """
    hint = "Write one with: lora-edge validate BUNDLE --json FILE"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read: {error.strerror}", hint) from error
    except ValueError as error:
        raise DataError(f"{os.fspath(path)} is not JSON: {error}", hint) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        found = "no report" if version is None else f"a report of version {version}"
        raise DataError(f"{os.fspath(path)} is {found}, expected version {SCHEMA_VERSION}", hint)
    described = files("lora_edge.reports").joinpath("report.schema.json")
    schema = json.loads(described.read_text(encoding="utf-8"))
    missing = [name for name in schema["required"] if name not in data]
    if missing:
        raise DataError(f"{os.fspath(path)} is no whole report: it lacks {missing[0]!r}", hint)
    return dict(data)
