"""What running a model on a task shows: layers that read one tensor, second moments, derivatives of the loss."""
