"""membrane."""
