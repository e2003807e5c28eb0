"""The commands beside ``launch``: look at a sweep, take its best trial, try an adapter."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from isaerft_sweep import __version__
from isaerft_sweep.errors import FolderError, IsaerftError

PROMPTS = (
    "My parcel has not arrived yet. What can I do?",
    "How do I keep basil alive in my kitchen?",
    "I have to give a short talk next week and I am nervous.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 2 after an error that the user can mend."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except IsaerftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="isaerft-sweep", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("leaderboard", help="print a sweep's ranking, also while it runs")
    show.add_argument("sweep", type=Path, help="the sweep's folder, outputs/NAME")
    show.set_defaults(run=_leaderboard)

    best = commands.add_parser("best", help="print the winner as JSON, as Hydra overrides or as a path")
    best.add_argument("sweep", type=Path, help="the sweep's folder, outputs/NAME")
    best.add_argument("--as", dest="form", choices=("json", "overrides", "path"), default="json")
    best.set_defaults(run=_best)

    generate = commands.add_parser("generate", help="answer prompts with and without an adapter")
    generate.add_argument(
        "folder", type=Path, help="a trial's folder, its adapter folder, or a sweep's folder (its best trial)"
    )
    generate.add_argument("--prompt", action="append", help="may be given several times")
    generate.add_argument("--max-new-tokens", type=int, default=60)
    generate.add_argument("--cache", default=None, help="where converted models are kept")
    generate.set_defaults(run=_generate)
    return parser


def _leaderboard(args: argparse.Namespace) -> None:
    from rich.console import Console

    from isaerft_sweep.results import leaderboard
    from isaerft_sweep.results.reading import read_sweep_folder

    sweep = read_sweep_folder(args.sweep)
    leaderboard.show(Console(), sweep.entries, sweep.metric, sweep.folder)


def _best(args: argparse.Namespace) -> None:
    from isaerft_sweep.plain import overrides
    from isaerft_sweep.results.reading import read_sweep_folder

    sweep = read_sweep_folder(args.sweep)
    winner = sweep.best()
    path = sweep.folder.trial(winner.record.name).path
    params = winner.record.point.params
    if args.form == "path":
        print(path)
    elif args.form == "overrides":
        print(shlex.join(overrides(params)))
    else:
        facts = {"name": winner.record.name, "run_id": winner.record.run_id, "path": str(path), "params": dict(params)}
        print(
            json.dumps({**facts, "metric": {sweep.metric.name: winner.record.metric}, "metrics": winner.metrics}, indent=1)
        )


def _generate(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise FolderError(f"--max-new-tokens must be at least 1 but got {args.max_new_tokens}.")
    adapter = _adapter_folder(args.folder)
    # PEFT asks transformers by an old name whether checkpointing is on; nothing that a reader of answers can act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from isaerft_sweep.adapter.generate import compare

    for prompt, before, after in compare(str(adapter), args.prompt or PROMPTS, args.max_new_tokens, args.cache):
        print(f"\n> {prompt}\n\nwithout the adapter:\n{before}\n\nwith it:\n{after}", flush=True)


def _adapter_folder(folder: Path) -> Path:
    """The adapter of a trial, of a sweep's best trial, or the folder itself."""
    from isaerft_sweep.results.reading import read_sweep_folder

    if (folder / "adapter_config.json").is_file():
        return folder
    if (folder / "adapter" / "adapter_config.json").is_file():
        return folder / "adapter"
    if (folder / "journal.jsonl").is_file():
        sweep = read_sweep_folder(folder)
        return sweep.folder.trial(sweep.best().record.name).adapter
    raise FolderError(
        f"'{folder}' must be the folder of a finished trial, of an adapter or of a sweep, but it is none of them."
    )


if __name__ == "__main__":
    sys.exit(main())
