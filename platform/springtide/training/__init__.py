"""Ray Train loop, checkpoints and resume."""
