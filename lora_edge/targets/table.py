"""Every place where ONNX Runtime runs a bundle, in one table."""

from __future__ import annotations

from lora_edge.errors import OptionError
from lora_edge.targets.clients import CLIENTS
from lora_edge.targets.providers import PROVIDERS
from lora_edge.targets.target import Target

TARGETS: tuple[Target, ...] = (*PROVIDERS, *CLIENTS)
"""The execution providers, the CPU first, and then the clients."""


def target(name: str) -> Target:
    """The target of a short name or of ONNX Runtime's own name, in any case.

    Raises:
        OptionError: there is none.
    """
    found = next((each for each in TARGETS if each.called(name)), None)
    if found is None:
        raise OptionError(
            f"there is no target {name!r}", f"Targets are {', '.join(x.name for x in TARGETS)}."
        )
    return found
