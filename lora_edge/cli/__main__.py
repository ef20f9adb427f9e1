"""``python -m lora_edge.cli``: for accelerate launch and torchrun, which start modules."""

from lora_edge.cli import main

if __name__ == "__main__":
    main()
