"""Reading and writing files: strictly, inside their folder, whole or not at all.

Knows errors; knows nothing of LoRA.
"""
