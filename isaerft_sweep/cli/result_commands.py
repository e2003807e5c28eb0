"""The commands that read a sweep's results: ranking, winner, repetition, report, analysis."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isaerft_sweep.api import load_sweep
from isaerft_sweep.cli.argument_types import (
    add_metric_argument,
    add_prompt_arguments,
    labels,
    strengths,
    weight,
    whole_number,
)
from isaerft_sweep.paths import WANDB
from isaerft_sweep.terminal import make_console

if TYPE_CHECKING:
    from isaerft_sweep.results.sweep_results import SweepResults


def add_result_commands(commands: Any) -> None:
    """Add the parsers of ``leaderboard``, ``best``, ``confirm``, ``report`` and ``analyze``."""
    show = commands.add_parser("leaderboard", help="print a sweep's ranking, also while it runs")
    _sweep_arguments(show)
    show.set_defaults(run=_leaderboard)

    best = commands.add_parser("best", help="print the winner as JSON, as Hydra overrides or as a path")
    _sweep_arguments(best)
    best.add_argument("--as", dest="form", choices=("json", "overrides", "path"), default="json", help="form of the output")
    best.set_defaults(run=_best)

    confirm = commands.add_parser("confirm", help="rerun the leaders with new seeds: which of them is the best?")
    confirm.add_argument("sweep", help="the sweep's folder, outputs/NAME")
    add_metric_argument(confirm)
    confirm.add_argument("--top", type=int, default=3, help="how many leaders (default 3)")
    confirm.add_argument("--seeds", type=int, default=3, help="how many new seeds each (default 3)")
    confirm.add_argument("--set", action="append", default=[], metavar="launcher.slots=2", help="repeatable")
    confirm.set_defaults(run=_confirm)

    _add_report(commands)

    analyze = commands.add_parser("analyze", help="evaluate a trial at other strengths, and without its largest latents")
    analyze.add_argument("folder", type=Path, help="a trial's folder, or a sweep's (its best trial)")
    analyze.add_argument(
        "--strengths", type=strengths, default=None, metavar="0,0.5,1", help="multiples of the adapter's change"
    )
    analyze.add_argument("--latents", type=whole_number, default=None, metavar="N", help="how many latents (default 5)")
    add_metric_argument(analyze)
    analyze.set_defaults(run=_analyze)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="write a page with everything about a sweep, and pictures for papers")
    _sweep_arguments(report)
    report.add_argument("--out", type=Path, help="the folder for report.html and figures/ (default: the sweep's)")
    report.add_argument(
        "--labels",
        type=labels,
        action="append",
        default=[],
        metavar="[LAYER=]FILE",
        help="labels of the SAE's latents: .json or .csv",
    )
    report.add_argument(
        "--generate", action="store_true", help="load the model and show answers of untrained, best and worst"
    )
    report.add_argument(
        "--analyze", action="store_true", help="load the model and evaluate the best trial as `analyze` does"
    )
    add_prompt_arguments(report)
    report.set_defaults(run=_report)


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", help=f"the sweep's folder, outputs/NAME, or {WANDB}ENTITY/PROJECT/ID")
    add_metric_argument(parser)
    parser.add_argument(
        "--prefer",
        type=weight,
        action="append",
        default=[],
        metavar="METRIC=WEIGHT",
        help="weight of a goal of a sweep with several `metrics` (default 1); repeatable",
    )


def _leaderboard(args: argparse.Namespace) -> None:
    from isaerft_sweep.results import leaderboard

    leaderboard.show(make_console(), _read(args))


def _best(args: argparse.Namespace) -> None:
    from isaerft_sweep.results.reading import best_as_json
    from isaerft_sweep.results.sweep_results import trial_of
    from isaerft_sweep.spec_fields import overrides

    sweep = _read(args)
    winner = sweep.best()
    for text in sweep.dependence:
        print(text, file=sys.stderr)
    if args.form == "overrides":
        print(shlex.join(overrides(winner.params)))
    elif args.form == "json":
        print(best_as_json(sweep))
    else:
        print(trial_of(winner).path)


def _confirm(args: argparse.Namespace) -> int:
    from isaerft_sweep.controller.confirm import confirm

    return confirm(Path(args.sweep), args.metric, args.top, args.seeds, args.set)


def _report(args: argparse.Namespace) -> None:
    from isaerft_sweep.results.analysis import analyse
    from isaerft_sweep.results.report.write import write_report
    from isaerft_sweep.results.samples import PROMPTS, as_text, make_samples
    from isaerft_sweep.results.sweep_results import trial_of

    sweep = _read(args)
    if args.generate or args.prompt:
        print(as_text(make_samples(sweep, args.prompt or PROMPTS, args.max_new_tokens)))
    if args.analyze:
        analyse(trial_of(sweep.best()))
    page, pictures = write_report(sweep, args.out, dict(args.labels))
    print(page)
    for path in pictures:
        print(path)


def _analyze(args: argparse.Namespace) -> None:
    from isaerft_sweep.results.analysis import LATENTS, STRENGTHS, analyse, tables
    from isaerft_sweep.results.finding import find_trial
    from isaerft_sweep.results.leaderboard import print_whole

    trial, _ = find_trial(args.folder, args.metric)
    result = analyse(trial, args.strengths or STRENGTHS, LATENTS if args.latents is None else args.latents)
    console = make_console()
    for table in tables(args.metric or trial.read_spec().metric, result):
        print_whole(console, table)
    console.print(f"{trial.analysis}; the report shows it too.", soft_wrap=True)


def _read(args: argparse.Namespace) -> SweepResults:
    """The sweep that the command names: a folder or one in W&B."""
    return load_sweep(args.sweep, args.metric, dict(args.prefer))._read
