"""The tensors of an adapter file -> what the adapter changes at each site, checked.

Knows names and shapes; knows nothing of bundles or sessions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.part import SiteEntry
from lora_edge.errors import BundleError
from lora_edge.maths.lora import Factors, FloatArray, Head, SiteChange
from lora_edge.names import SELECT, STACKED_PARTS, InputPart, lora_input
from lora_edge.runtime.adapters.binding import Changes

_HINT = "The file is not of this bundle; add the adapter again."


def parse_changes(
    source: str, tensors: Mapping[str, NDArray[np.floating]], sites: Mapping[str, SiteEntry]
) -> Changes:
    """Tensors by graph input name -> changes by module path, untouched sites left out.

    Args:
        source: names the tensors in errors.
        tensors: as in an adapter file; the gates, ``lora.select`` and task heads may be left out.
        sites: the graph's sites.

    Raises:
        BundleError: a tensor is unknown, missing or of another shape than its site.
    """
    known = {
        SELECT,
        *(lora_input(path, part) for path, site in sites.items() for part in site.parts),
    }
    unknown = set(tensors) - known
    if unknown:
        raise BundleError(f"{source}: {min(unknown)} is not an input of the graph", _HINT)
    for name, tensor in tensors.items():
        if (name == SELECT or name.endswith(".gate")) and (
            tensor.shape != (1, 1, 1) or tensor.item() != 1.0
        ):
            raise BundleError(f"{source}: {name} is not [1, 1, 1] of 1", _HINT)
    found = {path: _Site(source, tensors, path, site).change() for path, site in sites.items()}
    return {path: change for path, change in found.items() if change.parts()}


class _Site(NamedTuple):
    """A site, and the tensors of an adapter, its own among them."""

    source: str
    tensors: Mapping[str, NDArray[np.floating]]
    path: str
    site: SiteEntry

    def change(self) -> SiteChange:
        site = self.site
        vectors: dict[InputPart, FloatArray | None] = {}
        for part in STACKED_PARTS:
            vectors[part] = None
            if part in site.parts:
                vector = self._array(part)
                self._check(part, vector.shape, (1, site.out_features))
                vectors[part] = vector[0] if vector.any() else None
        return SiteChange(
            self._factors(), vectors["G"], vectors["bias"], vectors["weight"], self._head()
        )

    def _factors(self) -> Factors | None:
        site = self.site
        if "A" not in site.parts:
            return None
        a, b = self._array("A"), self._array("B")
        rank = a.shape[-1] if a.ndim else 0
        expected = (site.in_features, rank), (rank, site.out_features)
        if (a.shape, b.shape) != expected:
            raise BundleError(
                f"{self.source}: {self.path} has A {list(a.shape)} and B {list(b.shape)}, "
                f"expected [{site.in_features}, R] and [R, {site.out_features}]",
                _HINT,
            )
        if rank == 0 or (site.kind == "conv" and not b.any()):
            return None
        return Factors(a, b)

    def _head(self) -> Head | None:
        if "W" not in self.site.parts or lora_input(self.path, "W") not in self.tensors:
            return None
        w, c = self._array("W"), self._array("c")
        self._check("W", w.shape, (1, self.site.in_features, w.shape[-1]))
        self._check("c", c.shape, (1, 1, w.shape[-1]))
        return Head(w[0], c[0, 0])

    def _array(self, part: InputPart) -> FloatArray:
        name = lora_input(self.path, part)
        if name not in self.tensors:
            raise BundleError(f"{self.source}: {name} is missing", _HINT)
        return np.ascontiguousarray(self.tensors[name], np.float32)

    def _check(self, part: InputPart, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if got != expected:
            raise BundleError(
                f"{self.source}: {lora_input(self.path, part)} is {list(got)}, expected "
                f"{list(expected)}",
                _HINT,
            )
