"""What a contestant does, in a process of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import OptionError

Rows = Sequence[Sequence[int]]
Adapters = Sequence[str | None]


class Player(ABC):
    """A contestant: it imports, opens, and decodes batches of token ids.

    Several batches can be under way, each under a key of its own. A subclass keeps what one decodes
    with in ``_batches``, and the logits after its prompt in ``_logits``.

    Args:
        given: what it runs, as JSON; every player has ``threads``.
    """

    package: ClassVar[str]
    """What is to be installed for it."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.threads = int(given["threads"])
        self._batches: dict[str, Any] = {}
        self._logits: dict[str, NDArray[Any]] = {}

    @abstractmethod
    def imports(self) -> None:
        """Import the libraries; the seconds are counted apart from those of :meth:`open`."""

    def about(self) -> str:
        """What runs, in a line, once it was imported: the package and its version."""
        return f"{self.package} {version(self.package.partition('[')[0])}"

    @abstractmethod
    def open(self) -> None:
        """Load the model."""

    @abstractmethod
    def start(self, key: str, rows: Rows, adapters: Adapters, room: int) -> None:
        """Run prompts as one batch, with a cache for ``room`` positions.

        Args:
            key: of the batch; one of that key before is dropped.
            rows: token ids, one list for each row, of one length.
            adapters: of each row; ``None`` is none.
            room: longest sequence, prompt and new tokens together.
        """

    @abstractmethod
    def step(self, key: str, tokens: Sequence[int]) -> None:
        """Append a token to each row of a batch."""

    def logits(self, key: str) -> NDArray[Any] | None:
        """``[vocab]``: after the last token of the first row's prompt; ``None``: it tells none."""
        return self._logits[key]

    def first(self, key: str) -> tuple[int, float]:
        """The likeliest token after the first row's prompt, and its log-probability.

        Raises:
            NotImplementedError: the subclass has no logits, and does not tell this either.
        """
        logits = self.logits(key)
        if logits is None:
            raise NotImplementedError(
                f"{type(self).__name__} gives no logits: let it override first()"
            )
        token = int(logits.argmax())
        return token, -float(np.log(np.exp(logits.astype(np.float64) - logits[token]).sum()))

    def drop(self, key: str) -> None:
        """Forget a batch."""
        self._batches.pop(key, None)
        self._logits.pop(key, None)

    def load(self, adapter: str) -> None:
        """Load an adapter that was not used before.

        Raises:
            OptionError: this contestant has no such thing.
        """
        raise OptionError(
            f"{type(self).__name__} does not load {adapter!r} by itself", "Leave --only load out."
        )

    def switch(self, adapters: Adapters, room: int) -> None:
        """Be ready for the first token of a new batch with other adapters that are loaded.

        Raises:
            OptionError: this contestant has no such thing.
        """
        raise OptionError(
            f"{type(self).__name__} does not switch to {adapters}, room {room}",
            "Leave --only switch out.",
        )
