"""Probes of models without a cache: what both sides are given, and what the bundle's side gives.

A probe's rows are token ids; of images, one number each, the seed of a picture of noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.manifest import EncoderSpec
from lora_edge.maths.lora import FloatArray
from lora_edge.parity.plan.states import Probe, Row
from lora_edge.runtime import Binding, Runner

Inputs = Mapping[str, NDArray[Any]]
"""One row's inputs by name, without the batch's axis."""


def inputs_of(spec: EncoderSpec, row: Row) -> Inputs:
    """What a model reads of a row: ids, a mask of ones, two token types; or pixels."""
    if spec.image:
        random = np.random.default_rng(row[0])
        return {"pixel_values": random.standard_normal(spec.image).astype(np.float32)}
    arrays = {
        "input_ids": np.array(row, np.int64),
        "attention_mask": np.ones(len(row), np.int64),
        "token_type_ids": np.array(_types(row), np.int64),
    }
    return {name: arrays[name] for name in spec.inputs}


def inputs_of_ids(spec: EncoderSpec, coded: Mapping[str, Sequence[int]]) -> Inputs:
    """What a model reads of a tokenized text: ids, and types where it takes them."""
    ids = list(coded["input_ids"])
    types = coded.get("token_type_ids") or [0] * len(ids)
    arrays = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": list(types)}
    return {name: np.array(arrays[name], np.int64) for name in spec.inputs}


def observe_task(runner: Runner, probe: Probe, binding: Binding) -> list[FloatArray]:
    """The bundle's outputs of each row, ``[positions, columns]``, run as one batch."""
    spec = runner.encoder.spec
    if spec.image:
        pixels = np.stack([inputs_of(spec, row)["pixel_values"] for row in probe.rows])
        found = runner.outputs.pixels(pixels, binding)
    else:
        found = runner.outputs.rows(probe.rows, [_types(row) for row in probe.rows], binding)
    return [by_position(row) for row in found]


def by_position(output: NDArray[np.floating]) -> NDArray[Any]:
    """``[labels]`` as one position, ``[len, columns]`` as it is."""
    return output[None] if output.ndim == 1 else output


def _types(row: Sequence[int]) -> list[int]:
    """The second half belongs to the second text."""
    return [int(2 * index >= len(row)) for index in range(len(row))]
