"""``isaerft-sweep``: the commands beside ``launch``."""

from isaerft_sweep import interrupts

interrupts.end_with_one_line()

from isaerft_sweep.cli.parser import main

__all__ = ["main"]
