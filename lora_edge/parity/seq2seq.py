"""Probes of encoder-decoders: what both sides are given, and what the bundle's side gives.

A probe's rows are the encoder's token ids; of speech, one number each, the seed of features of
noise. What the decoder begins with follows from the row.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.manifest import Seq2SeqSpec
from lora_edge.maths.lora import FloatArray
from lora_edge.parity.plan.states import Probe, Row
from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.seq2seq import Seq2Seq, Sources

LONGEST_BEGINNING = 6


def beginning(spec: Seq2SeqSpec, row: Row) -> Row:
    """Tokens that the decoder is given first: its start token and one to five more, by the row."""
    random = np.random.default_rng(zlib.crc32(repr(row).encode()))
    more = random.integers(0, spec.vocab_size, random.integers(1, LONGEST_BEGINNING))
    return (spec.start[0], *(int(token) for token in more))


def source(spec: Seq2SeqSpec, row: Row) -> Mapping[str, NDArray[Any]]:
    """What the encoder of the reference reads of a row, without the batch's axis."""
    if spec.features:
        return {"input_features": _features(spec, row)}
    ids = np.array(row, np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def sources(spec: Seq2SeqSpec, rows: Sequence[Row]) -> Sources:
    """What the bundle's encoder reads of rows."""
    return np.stack([_features(spec, row) for row in rows]) if spec.features else rows


def observe_seq2seq(
    session: Seq2Seq, probe: Probe, tails: Sequence[Row], binding: Binding
) -> list[FloatArray]:
    """The logits ``[positions, vocab]`` of each row, over its beginning and its tail."""
    targets = [
        (*beginning(session.spec, row), *tail) for row, tail in zip(probe.rows, tails, strict=True)
    ]
    return session.logits(sources(session.spec, probe.rows), targets, binding)


def _features(spec: Seq2SeqSpec, row: Row) -> NDArray[np.float32]:
    random = np.random.default_rng(row[0])
    return random.standard_normal(spec.features).astype(np.float32)
