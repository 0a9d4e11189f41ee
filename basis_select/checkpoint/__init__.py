"""Where models come from; the checkpoint format, saving, loading and checking it."""
