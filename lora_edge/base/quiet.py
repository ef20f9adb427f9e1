"""Silence for transformers: no progress bars, no reports of what it loaded, no advice.

Imports transformers only where it is used, so that importing this module stays cheap.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def quiet(only: Sequence[tuple[str, type[Warning]]] | None = None) -> Iterator[None]:
    """Errors only from transformers' logger and no progress bars of its own, inside the block.

    What was shown before is shown again afterwards; what is raised inside is raised all the same.

    Args:
        only: the warnings to ignore: a pattern of how the message begins, and the category. None
            ignores all of them.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message, category in (("", Warning),) if only is None else only:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
