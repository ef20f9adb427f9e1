"""What a built library computes, beside numpy: sums of many shapes, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.errors import ParityError
from lora_edge.files.protobuf import bytes_field, varint_field
from lora_edge.runtime.native.rewrite import DOMAIN, OPERATOR, Node

LIMIT = 1e-6
"""Of the norm of what is added, and of the output's."""

_FLOAT = 1
_IR_VERSION, _OPSET = 8, 17


@dataclass(frozen=True)
class Sum:
    """One ``LoraSum``.

    Attributes:
        batch: rows.
        tokens: of each row.
        inner: K.
        pairs: (rank, columns) of each pair.
        by_row: A and B have an axis of rows.
    """

    batch: int
    tokens: int
    inner: int
    pairs: Sequence[tuple[int, int]]
    by_row: bool = False


class Worst(NamedTuple):
    """How many sums were compared, and the largest relative error."""

    cases: int
    error: float


_PACKED = ((16, 576), (16, 192), (16, 192))
CASES = (
    Sum(1, 1, 576, _PACKED),
    Sum(8, 1, 576, _PACKED),
    Sum(8, 1, 576, _PACKED, by_row=True),
    Sum(1, 128, 576, _PACKED),
    Sum(3, 40, 96, ((0, 64), (33, 100), (8, 7)), by_row=True),
    Sum(2, 17, 50, ((1, 3), (5, 19))),
    Sum(1, 1, 2048, ((64, 8192), (64, 8192))),
)


def check_sums(library: Path, cases: Sequence[Sum] = CASES, threads: int = 2) -> Worst:
    """Compare what a library computes with numpy.

    Args:
        library: the built file.
        cases: the sums.
        threads: of the sessions.

    Raises:
        ParityError: a sum is off by more than :data:`LIMIT`, or the library cannot be loaded.
    """
    worst = 0.0
    for seed, case in enumerate(cases):
        feeds = random_feeds(case, seed)
        try:
            session = open_sum(library, case, threads)
            (found,) = session.run(None, feeds)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise ParityError(
                f"the library that was built does not run: {error}",
                "Use another compiler: lora-edge native build --compiler PATH.",
            ) from error
        off = relative_error(found, expected(case, feeds), feeds["y"])
        if not off <= LIMIT:
            raise ParityError(
                f"the library that was built is off by {off:.1e} in {case}, allowed {LIMIT:.0e}",
                "Use another compiler: lora-edge native build --compiler PATH.",
            )
        worst = max(worst, off)
    return Worst(len(cases), worst)


def open_sum(library: Path, case: Sum, threads: int = 1) -> Any:
    """A session on a graph of one sum: inputs ``y``, ``x``, ``A0``, ``B0``, ...; output ``sum``."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(_model(case), options, providers=["CPUExecutionProvider"])


def random_feeds(case: Sum, seed: int) -> dict[str, NDArray[np.float32]]:
    """Inputs of a sum, of a normal distribution."""
    random = np.random.default_rng(seed)
    columns = sum(n for _, n in case.pairs)
    rows = (case.batch,) if case.by_row else ()
    shapes: dict[str, tuple[int, ...]] = {
        "y": (case.batch, case.tokens, columns),
        "x": (case.batch, case.tokens, case.inner),
    }
    for index, (rank, own) in enumerate(case.pairs):
        shapes[f"A{index}"], shapes[f"B{index}"] = (*rows, case.inner, rank), (*rows, rank, own)
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def expected(case: Sum, feeds: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """The sum, in float64."""
    wide = {name: array.astype(np.float64) for name, array in feeds.items()}
    added = [wide["x"] @ wide[f"A{i}"] @ wide[f"B{i}"] for i in range(len(case.pairs))]
    total: NDArray[np.float64] = wide["y"] + np.concatenate(added, axis=-1)
    return total


def relative_error(
    found: NDArray[np.float32], wanted: NDArray[np.float64], y: NDArray[np.float32]
) -> float:
    """How far off a sum is, beside what is added; where nothing is, beside the sum."""
    effect = np.linalg.norm(wanted - y) or np.linalg.norm(wanted)
    return float(np.linalg.norm(found - wanted) / effect)


def _model(case: Sum) -> bytes:
    names = ["y", "x", *(f"{part}{i}" for i in range(len(case.pairs)) for part in "AB")]
    node = Node(OPERATOR, names, ["sum"], "sum", DOMAIN)
    graph = [node.encoded(), bytes_field(2, "sum"), *(bytes_field(11, _value(x)) for x in names)]
    graph.append(bytes_field(12, _value("sum")))
    opsets = [("", _OPSET), (DOMAIN, 1)]
    imports = [bytes_field(8, bytes_field(1, d) + varint_field(2, v)) for d, v in opsets]
    whole = [varint_field(1, _IR_VERSION), *imports, bytes_field(7, b"".join(graph))]
    return b"".join(whole)


def _value(name: str) -> bytes:
    """A tensor of floats, of any shape."""
    tensor = bytes_field(1, varint_field(1, _FLOAT))
    return bytes_field(1, name) + bytes_field(2, tensor)
