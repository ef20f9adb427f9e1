"""What installs a target: the line for this system, or where it is."""

from __future__ import annotations

import platform
from collections.abc import Iterable

from lora_edge.targets.target import Package, Target


def line(target: Target, wheels: Iterable[str] = ()) -> str:
    """The line that installs a target here, or what brings it elsewhere; empty: not known.

    Args:
        target: the target.
        wheels: those that bring the package ``onnxruntime`` here; two of them do not go together.
    """
    system = platform.system()
    fitting = [x for x in target.packages if x.systems is None or system in x.systems]
    if not fitting:
        return ", or ".join(_there(package) for package in target.packages)
    package, present = fitting[0], {*wheels}
    newer = "--upgrade " if package.name in present else ""
    made = f"{package.installer} install {newer}{package.name}"
    twins = sorted(present - {package.name})
    if twins and target.ort_name and not package.beside:
        return f"pip uninstall -y {' '.join(twins)}; {made}"
    return made


def _there(package: Package) -> str:
    """Where a package is, that is for other systems than this one."""
    where = " or ".join("macOS" if x == "Darwin" else x for x in package.systems or ())
    return f"{package.name} of {package.installer}, on {where}"
