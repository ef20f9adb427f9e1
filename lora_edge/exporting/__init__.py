"""Export, add, remove: a base and adapters -> a published bundle, or nothing."""
