"""Where the command starts: an interrupt while it is being loaded ends it with one line too.

Imports next to nothing before the interrupt is seen to.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    os.write(2, b"interrupted; nothing was left behind\n")
    os._exit(130)


def main() -> None:
    """The command ``lora-edge``."""
    # Not where the system has it ignored, as it has for a job in the background.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
    from lora_edge.cli import main as run

    run(restore=ours)


if __name__ == "__main__":
    main()
