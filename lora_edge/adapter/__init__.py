"""A PEFT folder -> an adapter, or a refusal by name.

Knows files and PEFT's formats; knows nothing of graphs or runtimes.
"""
