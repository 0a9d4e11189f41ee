"""How good and how fast: lm-eval on a task, paired comparison with the parent, decode speed."""
