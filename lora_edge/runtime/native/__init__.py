"""An operator of our own that adds branches in one pass; optional, built on the device.

It is C++ that :mod:`~lora_edge.runtime.native.build` compiles into the user's cache. Bundles know
nothing of it: :mod:`~lora_edge.runtime.native.rewrite` puts it into a bundle's graph when that is
prepared on the device.
"""
