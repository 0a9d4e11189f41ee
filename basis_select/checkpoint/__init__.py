"""The checkpoint format, saving, loading and checking it."""
