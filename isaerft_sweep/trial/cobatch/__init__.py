"""Several trials in one forward pass."""
