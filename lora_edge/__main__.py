"""``python -m lora_edge`` is the command ``lora-edge``."""

from lora_edge.start import main

main()
