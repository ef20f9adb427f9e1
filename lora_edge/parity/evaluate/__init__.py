"""Metrics of a task over labelled examples, from PyTorch and from the bundle."""
