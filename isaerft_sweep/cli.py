"""The commands beside ``launch``: look at a sweep, take its best trial, try an adapter."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from isaerft_sweep import __version__
from isaerft_sweep.errors import FolderError, IsaerftError

if TYPE_CHECKING:
    from isaerft_sweep.results.reading import ReadSweep

WANDB = "wandb:"

PROMPTS = (
    "My parcel has not arrived yet. What can I do?",
    "How do I keep basil alive in my kitchen?",
    "I have to give a short talk next week and I am nervous.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code is 2 after an error that the user can mend."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except IsaerftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="isaerft-sweep", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("leaderboard", help="print a sweep's ranking, also while it runs")
    _sweep_arguments(show)
    show.set_defaults(run=_leaderboard)

    best = commands.add_parser("best", help="print the winner as JSON, as Hydra overrides or as a path")
    _sweep_arguments(best)
    best.add_argument("--as", dest="form", choices=("json", "overrides", "path"), default="json")
    best.set_defaults(run=_best)

    confirm = commands.add_parser("confirm", help="rerun the leaders with new seeds: which of them is the best?")
    _sweep_arguments(confirm)
    confirm.add_argument("--top", type=int, default=3, help="how many leaders (default 3)")
    confirm.add_argument("--seeds", type=int, default=3, help="how many new seeds each (default 3)")
    confirm.add_argument("--set", action="append", default=[], metavar="launcher.slots=2", help="may be given several times")
    confirm.set_defaults(run=_confirm)

    generate = commands.add_parser("generate", help="answer prompts with and without an adapter")
    generate.add_argument(
        "folder", type=Path, help="a trial's folder, its adapter folder, or a sweep's folder (its best trial)"
    )
    generate.add_argument("--prompt", action="append", help="may be given several times")
    generate.add_argument("--max-new-tokens", type=int, default=60)
    generate.add_argument("--cache", default=None, help="where converted models are kept")
    generate.set_defaults(run=_generate)
    return parser


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", help=f"the sweep's folder, outputs/NAME, or {WANDB}ENTITY/PROJECT/ID")
    parser.add_argument("--metric", help="rank by this one, not the sweep's own (eval/log_odds_chosen, ...)")


def _leaderboard(args: argparse.Namespace) -> None:
    from rich.console import Console

    from isaerft_sweep.results import leaderboard

    leaderboard.show(Console(), _read(args))


def _best(args: argparse.Namespace) -> None:
    from isaerft_sweep.plain import overrides
    from isaerft_sweep.results.reading import best_as_json, trial_of

    sweep = _read(args)
    winner = sweep.best()
    if args.form == "overrides":
        print(shlex.join(overrides(winner.params)))
    elif args.form == "json":
        print(best_as_json(sweep))
    else:
        print(trial_of(winner).path)


def _confirm(args: argparse.Namespace) -> int:
    from isaerft_sweep.controller.confirm import confirm

    return confirm(Path(args.sweep), args.metric, args.top, args.seeds, args.set)


def _read(args: argparse.Namespace) -> ReadSweep:
    """The sweep that a command was given: a folder, or one of W&B."""
    from isaerft_sweep.results.reading import read_sweep_folder

    if args.sweep.startswith(WANDB):
        from isaerft_sweep.results.from_wandb import read_wandb_sweep

        return read_wandb_sweep(args.sweep.removeprefix(WANDB), args.metric)
    return read_sweep_folder(Path(args.sweep), args.metric)


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
    from isaerft_sweep.results.reading import read_sweep_folder, trial_of

    if (folder / "adapter_config.json").is_file():
        return folder
    if (folder / "adapter" / "adapter_config.json").is_file():
        return folder / "adapter"
    if (folder / "journal.jsonl").is_file():
        return trial_of(read_sweep_folder(folder).best()).adapter
    raise FolderError(
        f"'{folder}' must be the folder of a finished trial, of an adapter or of a sweep, but it is none of them."
    )


if __name__ == "__main__":
    sys.exit(main())
