"""What every test finds: no native library of the user's, and no waiting for the disk."""

from __future__ import annotations

import gc
import os

os.environ["LORA_EDGE_NATIVE"] = "0"
# An export waits for the disk some seventy times. What is synced, and when, is tested where it is
# decided (tests/files/test_transaction.py); what a machine's crash leaves no test sees.
os.fsync = lambda _: None


def pytest_collection_finish() -> None:
    """What the imports have made stays, and no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()
