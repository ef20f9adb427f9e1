"""What is kept of a proof: goldens, the journal of a validation, the environment."""
