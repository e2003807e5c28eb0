"""``isaerft-sweep``: the commands beside ``launch``."""

from isaerft_sweep.cli.parser import main

__all__ = ["main"]
