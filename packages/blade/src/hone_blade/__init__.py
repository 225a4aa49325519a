"""hone."""
