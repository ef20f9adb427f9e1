"""Benchmarks: contestants in processes of their own that take turns, and ratios with their spread.

Nothing is imported here: a contestant's process must not pay for what it does not use.
"""
