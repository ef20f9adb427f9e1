"""What a manifest says of its adapters, against the PEFT files that the bundle carries.

Needs no PyTorch and no run: what is said here decides how an adapter is run at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_edge.bundle.bundle import Bundle
from lora_edge.fit.kinds import alone
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.carried import carried_adapter
from lora_edge.parity.case import Case


def check_entries(bundle: Bundle) -> list[Case]:
    """One failed case for each adapter whose entry contradicts its PEFT files."""
    names = sorted(set(bundle.manifest.adapters) - {NONE_ADAPTER})
    found = [(name, said) for name in names if (said := contradiction(bundle, [name]))]
    return [
        Case(f"adapter {name}, entry", (name,), "failed", f"adapter {name}: {said}", kind="proof")
        for name, said in found
    ]


def contradiction(bundle: Bundle, names: Sequence[str]) -> str:
    """The first thing that the manifest says of these adapters and their PEFT files deny.

    Empty where there is none, and where the bundle does not carry the files.
    """
    return next((said for name in names for said in _contradictions(bundle, name)), "")


def _contradictions(bundle: Bundle, name: str) -> Iterator[str]:
    directory = bundle.directory / "adapters" / name / "peft"
    if bundle.manifest.mode != "switchable" or not directory.is_dir():
        return
    entry, adapter = bundle.adapter(name), carried_adapter(bundle, name, directory)
    if entry.invocation != adapter.invocation:
        yield (
            f"the manifest says that {name} is {_invoked(entry.invocation)}, its PEFT config that "
            f"it is {_invoked(adapter.invocation)}"
        )
    reason = alone(adapter, bundle.manifest.sites)
    if bool(entry.alone) != bool(reason):
        yield (
            f"the manifest says that {name} can{'not' if entry.alone else ''} be blended, its PEFT "
            f"files that it can{'not' if reason else ''}{f': {reason}' if reason else ''}"
        )
    if entry.kind != adapter.kind:
        yield f"the manifest says that {name} is {entry.kind}, its PEFT files {adapter.kind}"
    if dict(entry.ranks) != dict(adapter.ranks()):
        yield f"the manifest's ranks of {name} are not those of its PEFT files"
    if entry.digest != adapter.digest:
        yield f"the manifest's digest of {name} is not that of its PEFT files"


def _invoked(tokens: Sequence[int]) -> str:
    if not tokens:
        return "active from the first token on"
    return f"activated by the tokens {', '.join(map(str, tokens))}"
