"""What every test finds: no native library that the user may have built."""

from __future__ import annotations

import gc
import os

os.environ["LORA_EDGE_NATIVE"] = "0"


def pytest_collection_finish() -> None:
    """What the imports have made stays, and no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()
