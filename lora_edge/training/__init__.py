"""Training of LoRA adapters on ``transformers.Trainer`` and PEFT. Importing it imports neither."""

from lora_edge.training.trainer import train

__all__ = ["train"]
