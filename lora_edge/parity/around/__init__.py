"""What lies around the graph, and what lies in it: everything that a person gets beside logits.

Texts and their tokens, chats, what ends a text, embeddings, labels, pictures, lengths; the weights
themselves, against the checkpoint; and the adapters' files, against PEFT's. ``reference`` asks
PyTorch's side, ``asked`` the bundle's, ``golden`` keeps the former's answers in the bundle.
"""

from lora_edge.parity.around.check import Held, look_around, look_inside

__all__ = ["Held", "look_around", "look_inside"]
