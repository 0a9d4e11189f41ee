"""What is measured over a task's tokens: second moments, and derivatives of the loss."""
