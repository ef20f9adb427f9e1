"""PEFT adapters of other types -> LoRA, approximated, with the error that was made.

Knows configs and folders; what is done to the tensors is :mod:`lora_edge.fit.factorize`'s affair,
the
only part that needs PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_edge.adapter.directory import CONFIG_FILE, read_config, tensor_file
from lora_edge.adapter.types import CONVERTIBLE, MERGE_FIRST, type_refusal
from lora_edge.base.checkpoint import Base, resolve_base
from lora_edge.errors import AdapterError, MissingDependencyError, UnsupportedAdapterError
from lora_edge.files.transaction import staging


@dataclass(frozen=True)
class Conversion:
    """A LoRA that approximates an adapter of another type.

    Attributes:
        directory: the LoRA's PEFT directory.
        peft_type: type of the original, e.g. ``LOHA``.
        rank: what was asked for: a rank, or the share of each delta's energy (its squared Frobenius
            norm) that is kept.
        ranks: module path -> the rank it got. MiSS keeps its own, whatever was asked for.
        errors: module path -> ``‖ΔW_lora − ΔW‖ / ‖ΔW‖``, Frobenius norms in float64.
    """

    directory: Path
    peft_type: str
    rank: int | float
    ranks: Mapping[str, int]
    errors: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors.values())

    @property
    def mean(self) -> float:
        """The mean of the errors."""
        return sum(self.errors.values()) / len(self.errors)

    def facts(self) -> dict[str, Any]:
        """What a bundle's manifest says of it."""
        return {
            "peft_type": self.peft_type,
            "rank": self.rank,
            "worst_error": self.worst,
            "mean_error": self.mean,
        }

    def summary(self) -> str:
        """One line for people."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        where = max(self.errors, key=lambda path: self.errors[path])
        return (
            f"{self.peft_type} approximated by a LoRA of {ranks}: relative error of ΔW "
            f"{self.mean:.2e} in the mean, {self.worst:.2e} at worst ({where})"
        )


def convert(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | Base,
    rank: int | float,
    output: str | os.PathLike[str],
    *,
    force: bool = False,
) -> Conversion:
    """Approximate an adapter by a LoRA, layer by layer.

    Args:
        adapter: PEFT directory of a type in :data:`lora_edge.adapter.types.CONVERTIBLE`.
        base: the adapter's base model.
        rank: rank of every layer; or, between 0 and 1, the share of each delta's energy to keep,
            from which each layer gets a rank of its own.
        output: the folder to make: a PEFT directory of type LoRA, with ``modules_to_save`` and the
            trainer's record carried over verbatim, and the original config.
        force: replace an existing PEFT directory.

    Raises:
        AdapterError: the adapter is a LoRA, damaged, or not for this base; the rank is larger than
            a layer's.
        UnsupportedAdapterError: the adapter's type, one of its layers, or something else that it
            carries has no LoRA equivalent.
        BaseModelError: the base is refused.
        BundleError: ``output`` is in the way.
        MissingDependencyError: torch or peft is not installed, or peft is too old.
    """
    check_rank(rank)
    source = Path(adapter)
    config = read_config(source)
    _refuse_config(source, config)
    tensor_file(source)
    model = base if isinstance(base, Base) else resolve_base(base)
    target = Path(output)
    with staging(target, force=force, marker=CONFIG_FILE) as stage:
        ranks, errors = _factorize(source, config, model, rank, stage)
    return Conversion(target, str(config["peft_type"]), rank, ranks, errors)


@contextlib.contextmanager
def converting(
    adapters: Mapping[str, str | os.PathLike[str]],
    base: Base,
    rank: int | float | None,
    say: Callable[[str], None],
) -> Iterator[tuple[dict[str, str | os.PathLike[str]], dict[str, Conversion]]]:
    """The adapters with those converted that are not of type LoRA; as they are without a rank.

    The converted ones exist inside the block only.

    Args:
        adapters: name -> PEFT directory.
        base: their base model.
        rank: see :func:`convert`; ``None`` converts nothing.
        say: called with one line for each conversion, the error included.
    """
    paths, conversions = dict(adapters), dict[str, Conversion]()
    if rank is None:
        yield paths, conversions
        return
    check_rank(rank)
    with tempfile.TemporaryDirectory(prefix="lora-edge-") as scratch:
        for index, (name, path) in enumerate(adapters.items()):
            if read_config(Path(path)).get("peft_type") == "LORA":
                continue
            say(f"converting {name} to a LoRA")
            # The name is checked only when the adapter is loaded, so it makes no path here.
            found = convert(path, base, rank, Path(scratch) / str(index))
            say(f"{name}: {found.summary()}")
            paths[name], conversions[name] = found.directory, found
        yield paths, conversions


def check_rank(rank: int | float) -> None:
    """Check that a rank is a whole number from 1 on, or a share of the energy between 0 and 1.

    Raises:
        AdapterError: it is neither.
    """
    fits = not isinstance(rank, bool) and (
        rank >= 1 if isinstance(rank, int) else isinstance(rank, float) and 0 < rank < 1
    )
    if not fits:
        raise AdapterError(
            f"the rank of a conversion is {rank!r}, expected a whole number from 1 on, or a "
            "fraction between 0 and 1",
            "Give a rank such as 16, or the share of each delta's energy to keep, such as 0.99.",
        )


def _refuse_config(source: Path, config: Mapping[str, Any]) -> None:
    peft_type = config.get("peft_type")
    if peft_type == "LORA":
        raise AdapterError(f"{source} is a LoRA already", "Export it as it is.")
    if peft_type not in CONVERTIBLE:
        message, hint = type_refusal(peft_type)
        raise UnsupportedAdapterError(f"{source} is refused: {message}", hint)
    bias = config.get("bias", "none")
    if bias not in ("none", None, False):
        raise UnsupportedAdapterError(
            f"{source} is refused: bias is {bias!r} in an adapter of type {peft_type}, and a "
            "conversion to LoRA would drop the trained biases",
            MERGE_FIRST,
        )


def _factorize(
    source: Path, config: Mapping[str, Any], base: Base, rank: int | float, stage: Path
) -> tuple[dict[str, int], dict[str, float]]:
    try:
        from lora_edge.fit.factorize import factorize
    except ImportError as error:
        raise MissingDependencyError(
            f"converting an adapter to LoRA needs PyTorch and a peft that converts: {error}",
            "Install them with: pip install -U 'lora-edge[export]' 'peft>=0.21'.",
        ) from error
    return factorize(source, config, base, rank, stage)
