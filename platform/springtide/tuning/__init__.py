"""Ray Tune search over any setting."""
