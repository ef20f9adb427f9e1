"""What a validation has finished, in a folder, so that one that was cut off can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from lora_edge.errors import DataError
from lora_edge.files.json import read_bytes
from lora_edge.files.jsonl import split_lines
from lora_edge.files.paths import path_inside
from lora_edge.files.schema import decode
from lora_edge.parity.case import Case
from lora_edge.parity.record.golden import FOLDER, Golden, load_golden, save_golden

_KEY, _PARTS = "lora-edge-validation.json", "finished.jsonl"
_HINT = "Remove the folder, and validate from the start."
_MOST = 1 << 28  # bytes


class _Part(TypedDict):
    session: str
    probe: str
    golden: str | None
    cases: tuple[Case, ...]


class Journal:
    """Finished parts of one validation: the cases of a session and probe, and the probe's golden.

    Args:
        directory: where they are kept; ``None`` keeps nothing.
        key: everything that the results depend on; a folder with another key is begun anew.

    Raises:
        DataError: the folder holds other files.
    """

    def __init__(self, directory: Path | None, key: Mapping[str, Any]) -> None:
        self._directory = directory
        self._parts: dict[tuple[str, str], list[Case]] = {}
        self.goldens: list[Golden] = []
        if directory is None:
            return
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if directory.is_dir() and any(directory.iterdir()):
            if not (directory / _KEY).is_file():
                raise DataError(
                    f"{directory} is not empty, and holds no validation to go on with",
                    "Name a new folder, or the one of the validation that was cut off.",
                )
            key_file = directory / _KEY
            if read_bytes(key_file, DataError, _HINT, max_bytes=1 << 20) == _text(digest).encode():
                self._read(directory)
                return
            self._remove()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _KEY).write_text(_text(digest), encoding="utf-8")

    def _read(self, directory: Path) -> None:
        file = directory / _PARTS
        content = read_bytes(file, DataError, _HINT, max_bytes=_MOST) if file.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # the line that was being written when it was cut off
            file.write_bytes(whole)
        for line in split_lines(whole, file):
            what = line.where
            data = line.object(DataError, _HINT, nonfinite=True)
            part = decode(_Part, data, what, DataError, _HINT)
            self._parts[part["session"], part["probe"]] = list(part["cases"])
            if part["golden"]:
                path = path_inside(directory, part["golden"], what, DataError, _HINT)
                self.goldens.append(load_golden(path))

    def finished(self, session: str, probe: str) -> list[Case] | None:
        """The cases of a part that is finished; ``None`` if it is not."""
        return self._parts.get((session, probe))

    def finish(
        self, session: str, probe: str, cases: Sequence[Case], golden: Golden | None = None
    ) -> None:
        """Keep a part; ``golden`` (reduced) where PyTorch was asked for it."""
        self._parts[session, probe] = list(cases)
        if self._directory is None:
            return
        saved = None if golden is None else save_golden(self._directory, golden)
        part = {
            "session": session,
            "probe": probe,
            "golden": saved,
            "cases": [dataclasses.asdict(case) for case in cases],
        }
        with (self._directory / _PARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(part) + "\n")

    def close(self) -> None:
        """All is finished: the journal goes, and the folder if nothing else is in it."""
        if self._directory is not None:
            self._remove()
            if not any(self._directory.iterdir()):
                self._directory.rmdir()

    def _remove(self) -> None:
        """Remove what a journal has written, and nothing else."""
        assert self._directory is not None
        goldens = self._directory / FOLDER
        for path in [*goldens.glob("*.npz"), self._directory / _PARTS, self._directory / _KEY]:
            path.unlink(missing_ok=True)
        if goldens.is_dir() and not any(goldens.iterdir()):
            goldens.rmdir()


def _text(digest: str) -> str:
    return json.dumps({"key": digest}) + "\n"
