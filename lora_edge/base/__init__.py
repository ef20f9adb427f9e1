"""The base model: its checkpoint, its layers, and the one loader of it in PyTorch.

Knows transformers (in the modules that say so); knows nothing of adapters or graphs.
"""
