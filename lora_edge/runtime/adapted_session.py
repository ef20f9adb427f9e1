"""ONNX Runtime's session as other libraries use it, with the adapters fed by itself.

Knows sessions and tensors; knows nothing of bundles or of the libraries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import DataError
from lora_edge.names import is_past

Arrays = Mapping[str, NDArray[Any]]
"""Graph input name -> array."""


class AdaptedSession:
    """An ``onnxruntime.InferenceSession`` to its callers; what is active is fed with each run.

    The inputs that are fed here are not among :meth:`get_inputs`. Attributes and methods that are
    not named here are the session's own.

    Args:
        session: the session below.
        fed: what is given to the graph beside the caller's inputs.
        padded_left: the graph takes rows that are padded on the left.
        owner: whoever switches it.

    Attributes:
        session, owner: as given.
        fed: as given; replaced to switch.
    """

    def __init__(self, session: Any, fed: Arrays, *, padded_left: bool, owner: object) -> None:
        self.session = session
        self.fed = fed
        self.owner = owner
        self._padded_left = padded_left

    def __getattr__(self, name: str) -> Any:
        if name == "session" or name.startswith("__"):  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.session, name)

    def get_inputs(self) -> list[Any]:
        """The inputs that the caller gives."""
        return [each for each in self.session.get_inputs() if each.name not in self.fed]

    def run(
        self, output_names: Sequence[str] | None, input_feed: Arrays, run_options: Any = None
    ) -> list[Any]:
        """As ``InferenceSession.run``.

        Raises:
            DataError: rows that are padded on the left, where the graph would read them wrongly;
                or more than one token for each of several rows behind a past.
        """
        if not self._padded_left:
            _check_rows(input_feed)
        found: list[Any] = self.session.run(output_names, {**input_feed, **self.fed}, run_options)
        return found

    def _refuse(self, *_: Any) -> None:
        """What a binding or OrtValues are run with.

        Raises:
            DataError: always: they do not have the adapters' tensors.
        """
        raise DataError(
            "an adapter is active on this session, and a run with IO binding or OrtValues would "
            "not have it",
            "Set use_io_binding of the model to False, or call run() with arrays.",
        )

    run_with_iobinding = run_with_ort_values = _refuse


def _check_rows(feeds: Arrays) -> None:
    """Refuse what a graph with fused attention would compute, and wrongly."""
    mask = np.asarray(feeds["attention_mask"])
    if (mask[:, :-1] < mask[:, 1:]).any() or 0 in mask[:, 0]:
        raise DataError(
            "rows are padded on the left, and the graph with fused attention would read them as "
            "if they were not",
            "Give one row at a time, pad on the right, or export with --form portable.",
        )
    rows, width = np.shape(feeds["input_ids"])
    behind = any(np.shape(value)[2] for name, value in feeds.items() if is_past(name))
    if behind and rows > 1 and width > 1:
        raise DataError(
            f"{rows} rows of {width} new tokens stand behind a past, and the graph with fused "
            "attention takes one new token for each row there",
            "Give one row at a time, or export with --form portable.",
        )
