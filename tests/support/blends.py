"""Golden cases of one blend, asked of another: the control of every blend's proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lora_edge.parity.plan.states import label, state_of
from lora_edge.parity.record.golden import Golden


def asked_of(golden: Golden, weights: Mapping[str, float]) -> Golden:
    """The case with another state on each row; what it expects is left as it was."""
    state = state_of(weights)
    probe = dataclasses.replace(golden.probe, states=(state,) * len(golden.probe.rows))
    floors = {label(state): next(iter(golden.floors.values()))}
    return dataclasses.replace(golden, probe=probe, floors=floors)
