"""An adapter meets a base: whether it fits, under which names, and what it changes there."""
