"""A task's data: where it comes from, how a row is read, how text becomes tokens, what is right."""
