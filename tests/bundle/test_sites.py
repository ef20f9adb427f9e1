"""A site is a layer with inputs; a layer knows nothing of graphs."""

from __future__ import annotations

import dataclasses

from lora_edge.base.layer import Layer
from lora_edge.bundle.part import SiteEntry, WeightEntry
from lora_edge.names import FACTOR_PARTS


def test_a_site_is_its_layer_with_inputs() -> None:
    layer = Layer(6, 5, kind="conv", bias=True, rank=4, transposed=True, refusal="no")
    site = SiteEntry.of(layer)
    assert site.parts == FACTOR_PARTS
    for field in dataclasses.fields(Layer):
        assert getattr(site, field.name) == getattr(layer, field.name)
    assert SiteEntry.of(layer, ()).parts == ()


def test_a_site_can_be_taken_for_its_layer_again() -> None:
    weight = WeightEntry("w", "float32", (6, 5), 0)
    site = dataclasses.replace(SiteEntry.of(Layer(6, 5)), weight=weight)
    again = SiteEntry.of(site, ("b",))
    assert (again.weight, again.parts, again.in_features) == (None, ("b",), 6)
