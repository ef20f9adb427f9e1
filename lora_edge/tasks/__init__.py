"""What a model is to do, and what follows from it for its class, its head and its outputs."""
