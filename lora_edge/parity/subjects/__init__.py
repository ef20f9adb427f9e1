"""What is compared, by what runs it: its inputs and outputs on both sides.

Torch-free: PyTorch's side is asked with the inputs that a subject gives.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_edge.bundle.manifest import Manifest
from lora_edge.bundle.part import Beginning, Part
from lora_edge.parity.subjects.decoder import DecoderSubject
from lora_edge.parity.subjects.encoder import EncoderSubject
from lora_edge.parity.subjects.encoder_decoder import EncoderDecoderSubject
from lora_edge.parity.subjects.subject import Subject

__all__ = ["Subject", "of_parts", "subject_of"]

_SUBJECTS: Mapping[tuple[str, ...], type[Subject]] = {
    ("decoder",): DecoderSubject,
    ("encoder",): EncoderSubject,
    ("decoder", "encoder"): EncoderDecoderSubject,
}


def subject_of(manifest: Manifest) -> Subject:
    """The subject of a bundle."""
    return of_parts(manifest.parts, manifest.beginning)


def of_parts(parts: Mapping[str, Part], beginning: Beginning | None) -> Subject:
    """The subject of parts, of a bundle or of a capture."""
    return _SUBJECTS[tuple(sorted(parts))](parts, beginning)
