"""What becomes a prompt, and what a prompt becomes: chat templates, tokenizers, defaults."""
