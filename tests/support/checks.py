"""The base check of a capture, with a reference of its own."""

from __future__ import annotations

from typing import Any

from lora_edge.base.checkpoint import Base
from lora_edge.parity.base import check_base
from lora_edge.parity.base.trial import Captured
from lora_edge.parity.reference import Reference
from lora_edge.tasks.task import TEXT, Task


def checked(graph: Captured, base: Base, task: Task = TEXT) -> dict[str, Any]:
    """The figures of the check; raises as it does."""
    return check_base(graph, task, Reference(base, task))
