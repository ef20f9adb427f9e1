"""The export folder: its manifest, its files, and what verifies them."""
