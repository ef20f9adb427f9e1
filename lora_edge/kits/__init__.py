"""Small projects to start from: pages, programs, and parts of apps.

Knows bundles' manifests and templates; runs nothing.
"""
