"""What every test finds: no native library of the user's, and no waiting for the disk."""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec

os.environ["LORA_EDGE_NATIVE"] = "0"

# A fork has no threads but its own: if it collected a session that its parent has left, the end of
# the session would wait for threads that are not there.
os.register_at_fork(after_in_child=gc.disable)
# An export waits for the disk some seventy times. What is synced, and when, is tested where it is
# decided (tests/files/test_transaction.py); what a machine's crash leaves no test sees.
os.fsync = lambda _: None
if find_spec("hypothesis"):  # some environments have none
    from hypothesis import HealthCheck, settings

    # How fast the machine is, is not what is tested.
    settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any")


def pytest_collection_finish() -> None:
    """What the imports have made stays, and no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()
