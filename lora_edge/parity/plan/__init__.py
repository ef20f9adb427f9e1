"""What is asked of a bundle: the probes of a validation, and how far they reach."""
