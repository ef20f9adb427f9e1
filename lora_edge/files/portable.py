"""Names of files that every file system takes, and keeps apart.

Source: "Naming Files, Paths, and Namespaces" of Microsoft's documentation. Knows nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_edge.errors import LoraEdgeError

_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{device}{digit}" for device in ("com", "lpt") for digit in "0123456789¹²³"
}
_SIGNS = frozenset('<>:"/\\|?*')


def unportable(name: str) -> str:
    """Why a name cannot be that of a file everywhere; empty where it can.

    Args:
        name: without folders.
    """
    if not name.isascii() or not name.isprintable() or _SIGNS & set(name):
        return "has signs that not every file system keeps"
    if name.endswith((".", " ")):
        return "ends in a dot or a blank, which Windows drops"
    if name.partition(".")[0].rstrip().casefold() in _DEVICES:
        return "is the name of a device on Windows"
    return ""


def check_apart(name: str, others: Iterable[str], error: type[LoraEdgeError]) -> None:
    """Check that file systems without upper and lower case keep a name apart from others.

    Raises:
        LoraEdgeError: of type ``error``: one of them differs in case only.
    """
    for other in others:
        if other != name and other.casefold() == name.casefold():
            raise error(
                f"the names {other!r} and {name!r} differ in case only: on Windows and macOS they "
                "are one folder",
                "Choose another name.",
            )
