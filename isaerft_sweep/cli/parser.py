"""All commands of ``isaerft-sweep``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import shtab

from isaerft_sweep.cli.adapter_commands import add_adapter_commands
from isaerft_sweep.cli.result_commands import add_result_commands
from isaerft_sweep.cli.serve_commands import add_serve_commands
from isaerft_sweep.cli.sweep_commands import add_sweep_commands
from isaerft_sweep.guard import guarded
from isaerft_sweep.version import __version__

DESCRIPTION = "Commands for sweeps and adapters: inspect a sweep, use its best trial, try an adapter."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see ``guarded``."""

    def run() -> int | None:
        parser = make_parser()
        args, rest = parser.parse_known_args(argv)
        # argparse takes overrides only before an option that follows the first of them
        if hasattr(args, "overrides") and all("=" in text and not text.startswith("-") for text in rest):
            args.overrides += rest
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        exit_code: int | None = args.run(args)
        return exit_code

    return guarded(run)


def make_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(prog="isaerft-sweep", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    help = 'print a script that completes commands and options on Tab: eval "$(isaerft-sweep --print-completion bash)"'
    shtab.add_argument_to(parser, "--print-completion", help=help)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_result_commands(commands)
    add_sweep_commands(commands)
    add_adapter_commands(commands)
    add_serve_commands(commands)
    return parser
