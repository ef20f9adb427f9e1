"""One process of the comparison: contestants made in shuffled order, turns in shuffled order."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import numpy as np
import torch
from contestants import WITHOUT_ADAPTER, makers
from numpy.typing import NDArray
from prepare import Graphs
from transformers.utils import logging

PROMPT = 128
_WARM_UP = 3
_PAUSE = 0.05  # seconds: the last one's threads must have stopped spinning; 5 ms is too short


def measure(
    graphs: Graphs, seed: int, steps: int, threads: int, cpu_time: bool
) -> dict[str, list[float]]:
    """Seconds of each decode step, by contestant.

    All feed the same tokens after the same prompt, so that the logits can be compared: a graph that
    computes something else is no contestant. A turn is two tokens: the first wakes the contestant's
    threads, which sleep while the others have theirs; the second is measured.

    Args:
        graphs: from :func:`prepare.prepare`.
        seed: of the tokens and of the order.
        steps: turns after the prompt.
        threads: of every contestant.
        cpu_time: count the seconds that one thread ran, not those that passed.

    Raises:
        RuntimeError: contestants disagree on the logits, or the adapter makes no difference.
    """
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    clock = time.thread_time if cpu_time else time.perf_counter
    order = random.Random(seed)
    making = list(makers(graphs, threads).items())
    order.shuffle(making)
    contestants = [(name, make()) for name, make in making]

    tokens = np.random.default_rng(seed).integers(0, graphs.part.vocab_size, PROMPT + 2 * steps)
    prompt, rest = tokens[:PROMPT].tolist(), tokens[PROMPT:].tolist()
    logits = {name: entry.start(prompt, len(tokens)) for name, entry in contestants}
    seconds: dict[str, list[float]] = {name: [] for name in logits}
    for count, (first, token) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
        order.shuffle(contestants)
        for name, entry in contestants:
            time.sleep(_PAUSE)
            entry.step(first)
            started = clock()
            logits[name] = entry.step(token)
            taken = clock() - started
            if count >= _WARM_UP:
                seconds[name].append(taken)
    compare(logits)
    return seconds


def compare(logits: Mapping[str, NDArray[np.float32]]) -> None:
    """Those with the adapter agree, those without agree, and the two differ."""
    groups = [
        {name: value for name, value in logits.items() if (name in WITHOUT_ADAPTER) is without}
        for without in (True, False)
    ]
    (_, plain), (_, adapted) = (next(iter(group.items())) for group in groups)
    effect = float(np.abs(adapted - plain).max())
    if not effect > 0:
        raise RuntimeError("the adapter makes no difference")
    for group in groups:
        first, expected = next(iter(group.items()))
        for name, value in group.items():
            error = float(np.abs(value - expected).max())
            if error > effect / 100:
                raise RuntimeError(
                    f"{name} and {first} disagree by {error:.2g} (the adapter's effect: "
                    f"{effect:.2g}): they do not run the same model"
                )
