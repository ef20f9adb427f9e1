"""What is known of each place where ONNX Runtime runs a bundle: data, and what installs each.

Knows names; knows nothing of bundles, and does not import ONNX Runtime.
"""
