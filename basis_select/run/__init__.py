"""A recipe's run: its stages, what they will cost, the folder they leave, and what is told of them."""
