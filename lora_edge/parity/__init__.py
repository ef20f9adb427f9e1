"""Parity: that an exported adapter does what it did in PyTorch."""

from lora_edge.parity.base_check import check_base
from lora_edge.parity.encoder_check import check_encoder
from lora_edge.parity.engine import validate
from lora_edge.parity.report import Case, Report

__all__ = ["Case", "Report", "check_base", "check_encoder", "validate"]
