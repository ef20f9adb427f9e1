"""What an adapter computes, in numpy alone.

Knows names and shapes; knows nothing of files, graphs or PyTorch.
"""
