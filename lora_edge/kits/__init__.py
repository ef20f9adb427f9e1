"""Small projects to start from: a page, a program for Node, a program in Python.

Knows bundles' manifests and templates; runs nothing.
"""
