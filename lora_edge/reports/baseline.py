"""Regression: is a report worse than an earlier one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_edge.reports.load import Data
from lora_edge.reports.words import Case, number


@dataclass(frozen=True)
class Regression:
    """A case that got worse.

    Attributes:
        session: that ran it.
        name: of the case; ``session`` where all of its cases are gone.
        text: one line: what, before, now.
    """

    session: str
    name: str
    text: str


def compare(data: Data, baseline: Data) -> Sequence[Regression]:
    """What is worse in a report than in an earlier one of the same bundle or of its successor.

    A case got worse when it passed and does not, when it ran and does not, or when its error
    relative to the effect grew by more than that error varies from position to position, before or
    now. A task metric got worse when fewer of its examples are as good as PyTorch's, and the split
    is significant; that fails by itself.

    Args:
        data: the report of today.
        baseline: the one to be held to.
    """
    now = {(case["session"], case["name"]): case for case in data["cases"]}
    ran = {session["name"] for session in data["sessions"]}
    found = []
    for session in baseline["sessions"]:
        name = session["name"]
        lost = sum(case["session"] == name for case in baseline["cases"])
        if lost and name not in ran:
            text = f"{name}: its {lost} cases were checked before, and the session did not run"
            found.append(Regression(name, "session", text))
    gone = {each.session for each in found}
    for case in baseline["cases"]:
        if case["session"] in gone:
            continue
        key = case["session"], case["name"]
        text = _worse(case, now.get(key))
        if text:
            found.append(Regression(*key, text))
    return found


def _worse(before: Case, now: Case | None) -> str:
    who = f"{before['name']} ({before['session'] or 'record'})"
    if now is None:
        # A missing proof is gone when the adapter has been proved, or when it is gone itself.
        if before["kind"] == "proof":
            return ""
        return f"{who}: it was checked before, and is not any more"
    if before["status"] == "passed" and now["status"] != "passed":
        return f"{who}: it passed before, and is {now['status']} now"
    if not before["figures"] or not now["figures"]:
        return ""
    old, new = before["figures"]["effect_error"], now["figures"]["effect_error"]
    spreads = [case["figures"]["error_spread"] for case in (before, now)]
    if old is None or None in spreads:
        return ""
    if new is None or new > old + max(spreads):
        return (
            f"{who}: the effect-relative error was {number(old)} and is {number(new)}, more than "
            f"its own spread of {number(max(spreads))} above"
        )
    return ""
