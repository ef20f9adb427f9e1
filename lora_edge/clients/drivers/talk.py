"""The driver's side of the talk: one JSON line for each order, numbers in a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def talk(does: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """Answer orders until there are no more.

    Args:
        does: order -> function of what it is given; ``arrays`` of its answer, float32, go into the
            order's file.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # only answers go to stdout
    for line in sys.stdin:
        given = json.loads(line)
        file = given.pop("file", None)
        try:
            answer = dict(does[given.pop("do")](**given))
            arrays = answer.pop("arrays", None)
            if arrays is not None:
                with open(file, "wb") as numbers:
                    for array in arrays:
                        np.ascontiguousarray(array, np.float32).tofile(numbers)
                answer["shapes"] = [list(array.shape) for array in arrays]
        except Exception as error:  # noqa: BLE001  whatever it is, it is told
            answer = {"error": str(error).strip().split("\n")[0] or repr(error), "hint": ""}
        print(json.dumps(answer), file=answers, flush=True)
