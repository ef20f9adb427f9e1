"""Values that are kept for their next use: the last used ones, up to a total size.

Knows keys and sizes; knows nothing of what the values are. Safe to use from several threads.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Mapping
from threading import Lock
from typing import Any, NamedTuple, TypeVar

CACHE_BYTES = 512 << 20
"""What a Runner keeps at most, if nothing else is asked for."""

ADAPTER, COMBINED, BUFFERS = "adapter", "combined", "buffers"
"""What the keys of a Runner's cache begin with; the third entry of an adapter's is its name."""

_KINDS = ADAPTER, COMBINED, BUFFERS

Key = tuple[Hashable, ...]
T = TypeVar("T")


class Resident(NamedTuple):
    """What a Runner keeps in memory for its next use.

    Attributes:
        limit: bytes that it keeps at most; adapters that stay may exceed it.
        adapters: bytes of each adapter.
        combined: bytes of blends and of adapters side by side, for mixed batches.
        buffers: bytes of the KV buffers that no run uses.
        prefixes: bytes of the keys and values of prompts' beginnings.
        prefix_limit: bytes of these that it keeps at most; they are not in ``limit``.
    """

    limit: int
    adapters: Mapping[str, int]
    combined: int
    buffers: int
    prefixes: int = 0
    prefix_limit: int = 0

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return sum(self.adapters.values()) + self.combined + self.buffers + self.prefixes


class _Entry(NamedTuple):
    value: Any
    size: int


class SizedCache:
    """The last used values, by key, whose sizes sum to at most a limit.

    What is too large to be kept is made again when it is next asked for. Whoever uses a value holds
    it: one that goes from here lives until its users are done.

    Args:
        limit: of the sum of the sizes; sizes are bytes, or 1 each.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._pinned: set[Key] = set()
        self._size = 0
        self._lock = Lock()
        self._making: dict[Key, Lock] = {}
        self._returned: deque[tuple[Key, Any, int]] = deque()

    def get(self, key: Key) -> Any | None:
        """The value, which is the last used one now; None if it is not here."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.value

    def get_or_make(self, key: Key, make: Callable[[], tuple[T, int]]) -> T:
        """The value; if it is not here it is made, by one thread while the others wait for it.

        Args:
            key: what it is found by.
            make: gives the value and its size; may ask for other keys, but not for this one.
        """
        found: T | None = self.get(key)
        if found is not None:
            return found
        with self._lock:
            making = self._making.setdefault(key, Lock())
        try:
            with making:
                found = self.get(key)
                if found is None:
                    found, size = make()
                    self.keep(key, found, size)
                return found
        finally:
            with self._lock:
                self._making.pop(key, None)

    def keep(self, key: Key, value: Any, size: int) -> None:
        """Put a value in as the last used one; others go, or itself, if the limit is exceeded."""
        gone: list[_Entry | None] = []  # freed outside of the lock
        with self._lock:
            self._put(key, value, size, gone)
            self._shrink(gone)

    def give_back(self, key: Key, value: Any, size: int) -> None:
        """As :meth:`keep`, for a finalizer, which may run anywhere: in this class, too.

        If the lock is held, perhaps by the very thread that runs the finalizer, the value is put in
        by the next call that gets it.
        """
        self._returned.append((key, value, size))
        self._settle()

    def take(self, best: Callable[[Key], int | None]) -> Any | None:
        """Take a value out.

        Args:
            best: key -> the lower the better, None for one that is not wanted.
        """
        self._settle()
        with self._lock:
            ranks = ((best(key), key) for key in self._entries)
            wanted = [(rank, key) for rank, key in ranks if rank is not None]
            if not wanted:
                return None
            _, key = min(wanted, key=lambda each: each[0])
            entry = self._entries.pop(key)
            self._size -= entry.size
            return entry.value

    @property
    def size(self) -> int:
        """The sum of the sizes."""
        self._settle()
        with self._lock:
            return self._size

    def pin(self, keys: Collection[Key]) -> None:
        """Never let the values of these keys go, which count all the same."""
        with self._lock:
            self._pinned |= set(keys)

    def clear(self, unwanted: Callable[[Key], bool]) -> None:
        """Let the values of some keys go, pinned or not; none of them is pinned any more."""
        gone = []
        with self._lock:
            self._pinned = {key for key in self._pinned if not unwanted(key)}
            for key in [key for key in self._entries if unwanted(key)]:
                gone.append(self._drop(key))

    def report(self) -> Resident:
        """What is here, of a Runner's kinds."""
        self._settle()
        with self._lock:
            sizes = {key: entry.size for key, entry in self._entries.items()}
        kinds = {kind: {k: v for k, v in sizes.items() if k[0] == kind} for kind in _KINDS}
        return Resident(
            self.limit,
            {str(key[2]): size for key, size in kinds[ADAPTER].items()},
            sum(kinds[COMBINED].values()),
            sum(kinds[BUFFERS].values()),
        )

    def _settle(self) -> None:
        """Put in what was given back, unless somebody holds the lock, who may be this thread."""
        gone: list[_Entry | None] = []
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._put(*self._returned.popleft(), gone)
                self._shrink(gone)
            finally:
                self._lock.release()

    def _put(self, key: Key, value: Any, size: int, gone: list[_Entry | None]) -> None:
        if key in self._entries:
            gone.append(self._drop(key))
        self._entries[key] = _Entry(value, size)
        self._size += size

    def _shrink(self, gone: list[_Entry | None]) -> None:
        if self._size <= self.limit:
            return
        for key in [key for key in self._entries if key not in self._pinned]:
            gone.append(self._drop(key))
            if self._size <= self.limit:
                return

    def _drop(self, key: Key) -> _Entry:
        entry = self._entries.pop(key)
        self._size -= entry.size
        return entry
