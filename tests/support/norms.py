"""What an inspection says of norms, against PEFT's own merge."""

from __future__ import annotations

from typing import Any

import pytest

from lora_edge.fit.inspect import Inspection


def assert_norms_are_pefts(found: Inspection, adapted: Any) -> None:
    """Merge each layer of PEFT's model: the change of its weight, and one that shows."""
    for path, module in found.modules.items():
        layer = adapted.get_submodule(path)
        before = layer.base_layer.weight.detach().clone()
        layer.merge()
        change = float((layer.base_layer.weight.detach() - before).norm() / before.norm())
        assert module.relative_norm == pytest.approx(change, rel=1e-4), path
        assert change > 0.1
