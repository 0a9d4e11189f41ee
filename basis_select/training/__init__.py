"""What tune, learn and heal share: batches, the loss, the loop."""
