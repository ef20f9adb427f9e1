"""The native library, built once in a process; where it cannot be, its tests are skipped."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache

import pytest

from lora_edge.errors import MissingDependencyError
from lora_edge.runtime.native.build import build, check_release, find_compiler
from lora_edge.runtime.native.library import Native, at


@cache
def _built() -> Native | str:
    try:
        check_release()
        find_compiler()
    except MissingDependencyError as error:
        return str(error)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_EDGE_CACHE", folder)
        return at(build())


def native() -> Native:
    """The library, or a skipped test with its reason."""
    found = _built()
    if isinstance(found, str):
        pytest.skip(found)
    return found
