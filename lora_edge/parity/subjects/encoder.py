"""A model without a cache: labels or hidden states of texts, or of images.

A probe's rows are token ids; of images, one number each, the seed of a picture of noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.bundle import Bundle
from lora_edge.maths.lora import FloatArray
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.plan.plan import shortest_window
from lora_edge.parity.plan.states import Inputs, Probe, Row, State
from lora_edge.parity.question import Question
from lora_edge.parity.reference import Reference
from lora_edge.parity.subjects.subject import SEEDS, Subject, binding_of, noise_of, reach_of
from lora_edge.runtime import Runner


class EncoderSubject(Subject):
    """A model of labels or embeddings."""

    headed = True

    @property
    def known(self) -> tuple[str, ...]:
        """What fills up short rows, too; of images nothing."""
        return () if self.reads.sample else (*super().known, "pad_token_id")

    def probes(self, question: Question, reference: Reference) -> Sequence[Probe]:
        """Rows at once."""
        image = bool(self.reads.sample)
        return self._planned(
            question,
            reference,
            vocab_size=SEEDS if image else self.reads.vocab_size,
            max_length=2 if image else self.reads.max_length,
            steps=1,
            window=None if image else shortest_window(question.base.config),
            reach=reach_of(question),
        )

    def prepared(self, probe: Probe, bundle: Bundle) -> Probe | None:
        """Without decode steps; without rows of a base that has no head of its own."""
        plain = dataclasses.replace(probe, steps=0)
        return _with_heads(plain) if _lacks_head(bundle) else plain

    def without(
        self, reference: Reference, rows: Sequence[Inputs], states: Sequence[State]
    ) -> Sequence[NDArray[np.floating]]:
        """The model's with the low-rank parts off and the adapter's task head kept.

        Beside a whole new head, a lost low-rank part would hardly show.
        """
        return reference.outputs(rows, states, low_rank=False)

    def inputs(self, row: Row, tail: Row = ()) -> Inputs:  # noqa: ARG002
        """Ids, a mask of ones, two token types; or pixels."""
        if self.reads.sample:
            return {"pixel_values": noise_of(self.reads, row)}
        return self.inputs_of(row, _types(row))

    def inputs_of(self, ids: Sequence[int], types: Sequence[int]) -> Inputs:
        """The same of ids and types that are given."""
        arrays = {
            "input_ids": np.array(ids, np.int64),
            "attention_mask": np.ones(len(ids), np.int64),
            "token_type_ids": np.array(types, np.int64),
        }
        return {name: arrays[name] for name in self.reads.inputs}

    def observe(self, runner: Runner, probe: Probe, tails: Sequence[Row]) -> list[FloatArray]:  # noqa: ARG002
        """All rows at once."""
        binding = binding_of(runner, probe)
        if self.reads.sample:
            pixels = np.stack([noise_of(self.reads, row) for row in probe.rows])
            found = runner.outputs.pixels(pixels, binding)
        else:
            found = runner.outputs.rows(probe.rows, [_types(row) for row in probe.rows], binding)
        return [by_position(row) for row in found]

    def off(self, runner: Runner, probe: Probe, tails: Sequence[Row]) -> None:  # noqa: ARG002
        """Nothing: an adapter's own head on the base is not in the bundle."""
        return None

    def tokens_of(self, runner: Runner, text: str, adapter: str | None = None) -> Row:
        """With the special tokens that the model reads."""
        if self.reads.sample:
            return super().tokens_of(runner, text, adapter)
        return tuple(runner.outputs.encode([text], states=runner.states(adapter, 1))[0].ids)


def by_position(output: NDArray[np.floating]) -> FloatArray:
    """``[labels]`` as one position, ``[len, columns]`` as it is."""
    return output[None] if output.ndim == 1 else output


def _lacks_head(bundle: Bundle) -> bool:
    """Whether the base alone has outputs that mean nothing, because its head is made up."""
    manifest = bundle.manifest
    has_head = any("W" in site.parts for site in manifest.sites.values())
    return manifest.mode == "switchable" and has_head and not bundle.adapter(NONE_ADAPTER).labels


def _with_heads(probe: Probe) -> Probe | None:
    """The probe without its rows of the base, ``None`` if nothing is left."""
    kept = [index for index, state in enumerate(probe.states) if state]
    if not kept:
        return None
    rows = tuple(probe.rows[index] for index in kept)
    states = tuple(probe.states[index] for index in kept)
    return dataclasses.replace(probe, rows=rows, states=states)


def _types(row: Sequence[int]) -> list[int]:
    """The second half belongs to the second text."""
    return [int(2 * index >= len(row)) for index in range(len(row))]
