"""What PyTorch is asked, and where the adapters are that it is asked with.

Knows bundles and PEFT directories; knows nothing of runtimes or PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import AdapterError, BundleError
from lora_edge.parity.compare import Floor
from lora_edge.parity.plan.far import Shaped
from lora_edge.parity.plan.plan import Depth
from lora_edge.parity.plan.states import Probe, Row
from lora_edge.parity.record.golden import Golden

_LONGER = 100  # tokens, prompt and continuation, from which on a row's floor is its own


@dataclass(frozen=True)
class Question:
    """What PyTorch is asked.

    Attributes:
        bundle: the bundle that is checked.
        base: its base model.
        sources: PEFT directories of the bundle's adapters, of :func:`sources_of`.
        steps: greedy tokens after each prompt; ``None``: what the subject says.
        seed: of the random prompts.
        prompts: token ids of the user's own prompts, used before random ones.
        given: probes of the user's own, besides those of the plan.
        planned: whether the plan is wanted.
        done: cases that are known already, from a validation that was cut off.
        depth: how far the plan goes.
        shaped: prompts in the shape of the bundle's chat template, if it has one.
    """

    bundle: Bundle
    base: Base
    sources: Mapping[str, Path]
    steps: int | None
    seed: int
    prompts: Sequence[Row]
    given: Sequence[Probe] = ()
    planned: bool = True
    done: Sequence[Golden] = ()
    depth: Depth = "normal"
    shaped: Shaped | None = None

    @property
    def floors(self) -> dict[str, Floor]:
        """Label of a state -> its floor on short rows, as far as known."""
        usual = [golden for golden in self.done if golden.probe.part != "crowd"]
        short = [golden for golden in usual if not is_long(golden.probe, golden.tails)]
        return {name: floor for golden in short for name, floor in golden.floors.items()}

    def wanted(self, plan: Sequence[Probe]) -> list[Probe]:
        """What is to be run: a merged bundle is its adapter and nothing else."""
        known = {golden.probe.name for golden in self.done}
        mode = self.bundle.manifest.mode
        probes = [*(plan if self.planned else ()), *self.given]
        return [
            probe
            for probe in probes
            if probe.name not in known and (mode == "switchable" or probe.kind == "adapter")
        ]


def sources_of(
    bundle: Bundle,
    base: Base,
    names: Sequence[str],
    directories: Mapping[str, str | os.PathLike[str]],
) -> dict[str, Path]:
    """The PEFT directory of each adapter: a given one, or the bundle's own copy.

    Raises:
        BundleError: the base is not the bundle's, or an adapter's PEFT files are nowhere.
        AdapterError: a given PEFT directory is not the one that was exported.
    """
    fingerprint = bundle.manifest.base["fingerprint"]
    if base.fingerprint() != fingerprint:
        raise BundleError(
            f"{base.name_or_path} has fingerprint {base.fingerprint()[:12]}, the bundle was made "
            f"from {fingerprint[:12]}",
            f"Give the bundle's own base: {bundle.manifest.base['name_or_path']}",
        )
    return {name: _peft_directory(bundle, name, directories) for name in names}


def is_long(probe: Probe, tails: Sequence[Row]) -> bool:
    """Whether a probe's noise is its own: it grows with the length of a row."""
    longest = max(len(row) + len(tail) for row, tail in zip(probe.rows, tails, strict=True))
    return probe.kind != "mixed" and longest > _LONGER


def _peft_directory(bundle: Bundle, name: str, given: Mapping[str, str | os.PathLike[str]]) -> Path:
    if name in given:
        digest = load_adapter(given[name], name).digest
        if digest != bundle.adapter(name).digest:
            raise AdapterError(
                f"{os.fspath(given[name])} is not the adapter that was exported as {name}: its "
                f"digest is {digest[:12]}, expected {bundle.adapter(name).digest[:12]}",
                f"Give the folder that {name} was exported from.",
            )
        return Path(given[name])
    directory = bundle.directory / "adapters" / name / "peft"
    if not directory.is_dir():
        raise BundleError(
            f"the PEFT files of adapter {name} are not in the bundle",
            f"Give their folder with -a {name}=DIR.",
        )
    return directory
