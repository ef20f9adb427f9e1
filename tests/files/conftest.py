from __future__ import annotations

import pytest

from lora_edge.files.owner import Owner
from tests.support.transactions import BOOT, HOST


@pytest.fixture
def foreign() -> Owner:
    """A process of another host, with the id of one that does not run here."""
    return Owner(HOST, BOOT, "pid:[1]", 999_999, 1)
