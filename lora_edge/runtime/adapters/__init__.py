"""The adapters of a session: what is switched on for which row, and what the graph is fed."""
