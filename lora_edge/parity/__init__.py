"""Parity: that an exported adapter does what it did in PyTorch."""

from lora_edge.parity.base import check_base
from lora_edge.parity.case import Case
from lora_edge.parity.engine import validate
from lora_edge.parity.record.given import add_goldens
from lora_edge.parity.report import Report
from lora_edge.parity.validate_in import validate_in

__all__ = [
    "Case",
    "Report",
    "add_goldens",
    "check_base",
    "validate",
    "validate_in",
]
