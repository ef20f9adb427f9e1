"""Parity: that an exported adapter does what it did in PyTorch."""

from lora_edge.parity.base_check import check_base
from lora_edge.parity.encoder_check import check_encoder
from lora_edge.parity.engine import validate
from lora_edge.parity.record.given import add_goldens
from lora_edge.parity.report import Case, Report
from lora_edge.parity.seq2seq_check import check_seq2seq

__all__ = [
    "Case",
    "Report",
    "add_goldens",
    "check_base",
    "check_encoder",
    "check_seq2seq",
    "validate",
]
