"""What an export writes for apps on phones: ``.ort`` files, checked, and what accelerators take.

Knows bundles that are proved; publishes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_edge.bundle.bundle import Bundle, file_entry
from lora_edge.bundle.part import Part
from lora_edge.errors import ParityError, UnsupportedModelError
from lora_edge.exporting.graphs import Progress
from lora_edge.targets.target import Target

FOLDER = "mobile"
OPERATORS_FILE = f"{FOLDER}/required_operators.config"
_SAME = 1e-3  # logits of one graph, whose activations are rounded, optimized in two ways
_PHONES = ("mobile", "nnapi", "coreml")


def is_mobile(targets: Sequence[Target]) -> bool:
    """Whether ``.ort`` files are asked for."""
    return any(each.name == "mobile" for each in targets)


def check_size(stage: Path, parts: Sequence[Part]) -> None:
    """Check that ``.ort`` files can hold the weights.

    Raises:
        UnsupportedModelError: they cannot.
    """
    from lora_edge.runtime.ort_format import MOST_BYTES

    for part in parts:
        data = stage / f"{part.file}_data"
        size = data.stat().st_size if data.is_file() else 0
        if size > MOST_BYTES:
            raise UnsupportedModelError(
                f"{data.name} has {size:,} bytes, and a file in ONNX Runtime's format has room "
                f"for {MOST_BYTES:,}",
                "Leave mobile out of --target, or use --precision int4 or int8.",
            )


def write_mobile(bundle: Bundle, say: Progress) -> Bundle:
    """Write each graph of a bundle as an ``.ort`` file, and replay a golden case on it.

    Args:
        bundle: proved, with its golden cases; not published yet.
        say: called with a line for each file.

    Returns:
        The bundle with the files in its manifest.

    Raises:
        BundleError: ONNX Runtime cannot write one.
        ParityError: one does something else than the graph that it is made of.
    """
    from lora_edge.runtime.ort_format import write_operators, write_ort

    (bundle.directory / FOLDER).mkdir()
    plain: dict[str, Part] = {}
    fixed: dict[str, Part] = {}
    for name, part in bundle.manifest.parts.items():
        file = _beside(part.file)
        write_ort(bundle.directory / part.file, bundle.directory / file, "all")
        plain[name] = dataclasses.replace(part, file=file, exact="", static=None)
        if part.static is not None:
            static = dataclasses.replace(part.static, file=_beside(part.static.file))
            write_ort(bundle.directory / part.static.file, bundle.directory / static.file, "basic")
            fixed[name] = dataclasses.replace(part, exact="", static=static)
    made = [part.file for part in plain.values()]
    made += [part.static.file for part in fixed.values() if part.static is not None]
    write_operators([bundle.directory / file for file in made], bundle.directory / OPERATORS_FILE)
    entries = {file: file_entry(bundle.directory / file) for file in (*made, OPERATORS_FILE)}
    files = {**bundle.manifest.files, **entries}
    whole = bundle.write_manifest(dataclasses.replace(bundle.manifest, files=files))
    _replay(whole, plain, say)
    if fixed:
        _replay(whole, fixed, say, static=True)
    return whole


def _beside(file: str) -> str:
    """Where the ``.ort`` file of a graph is."""
    return f"{FOLDER}/{Path(file).stem}.ort"


def _replay(
    bundle: Bundle, parts: Mapping[str, Part], say: Progress, *, static: bool = False
) -> None:
    """Run a golden case on graphs in the place of the bundle's own."""
    from lora_edge.parity.checks import compare
    from lora_edge.parity.compare import Tolerance
    from lora_edge.parity.drift import drifts
    from lora_edge.parity.record.golden import recorded
    from lora_edge.parity.static import fitting
    from lora_edge.parity.subjects import subject_of
    from lora_edge.runtime import Runner

    own = dataclasses.replace(bundle.manifest, parts=parts)
    runner = Runner(Bundle(bundle.directory, own), session_cache=False, static=static)
    short = [x for x in recorded(bundle) if not x.probe.part and not x.probe.given]
    golden = next((x for x in short if x.probe.kind == "adapter"), short[0])
    (asked,) = fitting(runner, [golden], "quick").goldens
    say(f"replaying {asked.probe.name} on {runner.graph_file}")
    said = ""
    if drifts(bundle.manifest):  # the goldens are of the graph in floats
        subject, ships = subject_of(bundle.manifest), Runner(bundle, session_cache=False)
        found, wanted = (subject.observe(x, asked.probe, asked.tails) for x in (runner, ships))
        if not all(np.allclose(a, b, atol=_SAME) for a, b in zip(found, wanted, strict=True)):
            said = "its outputs are not those of the graph that it is made of"
    else:
        cases = compare(runner, asked, Tolerance())
        said = next((case.reason for case in cases if case.status != "passed"), "")
    if said:
        raise ParityError(
            f"{runner.graph_file} does not do what {asked.probe.name} should: {said}",
            "Nothing was published. Export without --target mobile, and report it.",
        )


def phones(bundle: Bundle, targets: Sequence[Target]) -> list[str]:
    """What NNAPI and CoreML may take of a bundle's graphs, a line each; empty: nobody asked.

    Args:
        bundle: the bundle.
        targets: what it is for.
    """
    wanted = {each.name for each in targets} & set(_PHONES)
    if not wanted:
        return []
    from lora_edge.graph.partitions import partitions

    lines = []
    for part in bundle.manifest.parts.values():
        file = part.file if part.static is None else part.static.file
        for found in partitions(bundle.directory / file):
            if "mobile" in wanted or found.provider in wanted:
                lines.append(f"{file} on {found.line()}")
    return lines
