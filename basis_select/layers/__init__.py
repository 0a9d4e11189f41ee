"""Layers that are written as bases, the groups of them that read one tensor, and what a group costs."""
