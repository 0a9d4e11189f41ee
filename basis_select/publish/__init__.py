"""What goes to a hub: a checkpoint, its card, and how it was made."""
