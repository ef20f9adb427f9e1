"""Bundles in other runtimes: a driver process for each, and what is said to it.

Knows bundles' names and numbers; judges nothing.
"""
