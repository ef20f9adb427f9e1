"""One set of worlds for all tests of the session."""

from __future__ import annotations

import pytest

from tests.faults.worlds import Worlds


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(tmp_path_factory.mktemp("worlds"))
