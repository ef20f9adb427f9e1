"""Training of LoRA adapters on ``transformers.Trainer`` and PEFT. Importing it imports neither."""

from lora_edge.training.settings import Settings
from lora_edge.training.trainer import Plan, plan, train

__all__ = ["Plan", "Settings", "plan", "train"]
