"""Training of LoRA adapters on ``transformers.Trainer`` and PEFT. Importing it imports neither."""

from lora_edge.training.train import train

__all__ = ["train"]
