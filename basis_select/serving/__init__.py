"""Where checkpoints are served from other programs than this one."""
