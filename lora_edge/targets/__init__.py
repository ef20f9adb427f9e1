"""What is known of each execution provider that a bundle can run on: data only.

Knows names; knows nothing of bundles, and does not import ONNX Runtime.
"""
