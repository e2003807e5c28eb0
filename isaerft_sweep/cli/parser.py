"""Commands for sweeps and adapters: inspect a sweep, use its best trial, try an adapter."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import shtab

from isaerft_sweep import __version__
from isaerft_sweep.api import WANDB, load_sweep
from isaerft_sweep.cli.argument_types import at_least_one, labels, strength, strengths, weight, whole_number
from isaerft_sweep.cli.serve_commands import add_serve_commands
from isaerft_sweep.cli.sweep_commands import add_sweep_commands
from isaerft_sweep.errors import FolderError
from isaerft_sweep.guard import guarded
from isaerft_sweep.terminal import make_console

if TYPE_CHECKING:
    from isaerft_sweep.results.reading import ReadSweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see ``guarded``."""

    def run() -> int | None:
        args = make_parser().parse_args(argv)
        exit_code: int | None = args.run(args)
        return exit_code

    return guarded(run)


def make_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(prog="isaerft-sweep", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    help = 'print a script that completes commands and options on Tab: eval "$(isaerft-sweep --print-completion bash)"'
    shtab.add_argument_to(parser, "--print-completion", help=help)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("leaderboard", help="print a sweep's ranking, also while it runs")
    _sweep_arguments(show)
    show.set_defaults(run=_leaderboard)

    add_sweep_commands(commands)

    best = commands.add_parser("best", help="print the winner as JSON, as Hydra overrides or as a path")
    _sweep_arguments(best)
    best.add_argument("--as", dest="form", choices=("json", "overrides", "path"), default="json")
    best.set_defaults(run=_best)

    confirm = commands.add_parser("confirm", help="rerun the leaders with new seeds: which of them is the best?")
    confirm.add_argument("sweep", help="the sweep's folder, outputs/NAME")
    _metric_argument(confirm)
    confirm.add_argument("--top", type=int, default=3, help="how many leaders (default 3)")
    confirm.add_argument("--seeds", type=int, default=3, help="how many new seeds each (default 3)")
    confirm.add_argument("--set", action="append", default=[], metavar="launcher.slots=2", help="repeatable")
    confirm.set_defaults(run=_confirm)

    card = commands.add_parser("card", help="rewrite a trial's model card, if you like from your own template")
    card.add_argument("trial", type=Path, nargs="?", help="the folder of a finished trial, or of a sweep (its best trial)")
    card.add_argument("--template", type=Path, help="a Jinja template; start from the one that --fields prints")
    card.add_argument("--fields", action="store_true", help="print the template in use instead")
    _metric_argument(card)
    card.set_defaults(run=_card)

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
    _prompt_arguments(report)
    report.set_defaults(run=_report)

    analyze = commands.add_parser("analyze", help="evaluate a trial at other strengths, and without its largest latents")
    analyze.add_argument("folder", type=Path, help="a trial's folder, or a sweep's (its best trial)")
    analyze.add_argument(
        "--strengths", type=strengths, default=None, metavar="0,0.5,1", help="multiples of the adapter's change"
    )
    analyze.add_argument("--latents", type=whole_number, default=None, metavar="N", help="how many latents (default 5)")
    _metric_argument(analyze)
    analyze.set_defaults(run=_analyze)

    export = commands.add_parser("export", help="write the model with an adapter in it, for plain transformers")
    export.add_argument("folder", type=Path, help="a trial's folder, its adapter, or a sweep's folder (its best trial)")
    form = export.add_mutually_exclusive_group()
    form.add_argument("--merged", dest="form", action="store_const", const="merged", help="plain weights, where exact")
    form.add_argument(
        "--lm-eval", dest="form", action="store_const", const="lm-eval", help="the vector for lm-eval's --model steered"
    )
    form.add_argument("--standalone", dest="form", action="store_const", const="standalone", help="with custom model code")
    export.add_argument("--out", type=Path, help="the folder to make (default: beside the adapter)")
    export.add_argument("--strength", type=strength, default=1.0, help="multiple of the adapter's change (default 1)")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights")
    export.add_argument("--cache", default=None, help="the folder of converted models")
    _metric_argument(export)
    export.set_defaults(run=_export)

    push = commands.add_parser("push", help="upload an adapter or an export to the Hub")
    push.add_argument("folder", type=Path, help="a trial's folder, a sweep's (its best trial), or an exported model")
    push.add_argument("--repo", help="ORG/NAME (default: the card's model name, under the token's owner)")
    push.add_argument("--private", action="store_true")
    push.add_argument("--dry-run", action="store_true", help="check, and list what would be uploaded")
    _metric_argument(push)
    push.set_defaults(run=_push)

    importer = commands.add_parser("import", help="read an adapter folder of the published project")
    importer.add_argument("folder", type=Path, help="with adapter_config.json, blocks_manifest.json and blocks_*.pt")
    importer.add_argument("--out", type=Path, help="the folder to make (default: imported/NAME)")
    importer.add_argument("--base", help="the base model, ORG/NAME, if the folder's name does not contain it")
    importer.set_defaults(run=_import)

    add_serve_commands(commands)

    generate = commands.add_parser("generate", help="answer prompts with and without an adapter")
    generate.add_argument(
        "folder", type=Path, help="a trial's folder, its adapter folder, or a sweep's folder (its best trial)"
    )
    _prompt_arguments(generate)
    generate.add_argument("--cache", default=None, help="the folder of converted models")
    _metric_argument(generate)
    generate.set_defaults(run=_generate)
    return parser


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", help=f"the sweep's folder, outputs/NAME, or {WANDB}ENTITY/PROJECT/ID")
    _metric_argument(parser)
    parser.add_argument(
        "--prefer",
        type=weight,
        action="append",
        default=[],
        metavar="METRIC=WEIGHT",
        help="weight of a goal of a sweep with several `metrics` (default 1); repeatable",
    )


def _metric_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metric", help="rank by this metric instead of the sweep's own (eval/log_odds_chosen, ...)")


def _prompt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", help="a prompt to answer; repeatable")
    parser.add_argument("--max-new-tokens", type=at_least_one, default=60)


def _leaderboard(args: argparse.Namespace) -> None:
    from isaerft_sweep.results import leaderboard

    leaderboard.show(make_console(), _read(args))


def _best(args: argparse.Namespace) -> None:
    from isaerft_sweep.results.reading import best_as_json, trial_of
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


def _card(args: argparse.Namespace) -> None:
    from isaerft_sweep.paths import asset
    from isaerft_sweep.results.card.model_card import TEMPLATE, refresh_card
    from isaerft_sweep.results.finding import find_trial

    if args.fields:
        print((args.template or asset(TEMPLATE)).read_text(encoding="utf-8"), end="")
        return
    if args.trial is None:
        raise FolderError("`card` needs a trial's folder, or --fields.")
    trial, standing = find_trial(args.trial, args.metric)
    refresh_card(trial, standing, args.template)
    print(trial.card)


def _read(args: argparse.Namespace) -> ReadSweep:
    """The sweep that the command names: a folder or one in W&B."""
    return load_sweep(args.sweep, args.metric, dict(args.prefer))._read


def _report(args: argparse.Namespace) -> None:
    from isaerft_sweep.results.analysis import analyse
    from isaerft_sweep.results.reading import trial_of
    from isaerft_sweep.results.report.write import write_report
    from isaerft_sweep.results.samples import PROMPTS, as_text, make_samples

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


def _export(args: argparse.Namespace) -> None:
    from isaerft_sweep.publish.export import export
    from isaerft_sweep.results.finding import find_adapter

    _quiet()
    if args.form == "lm-eval":
        from isaerft_sweep.publish.steering_file import write_steering_file

        file, base = write_steering_file(find_adapter(args.folder, args.metric), args.out, args.cache, args.strength)
        print(file)
        print(f"lm_eval --model steered --model_args pretrained={base},steer_path={file} --tasks TASK")
        return
    exported = export(find_adapter(args.folder, args.metric), args.out, args.form, args.cache, args.dtype, args.strength)
    print(exported.folder)
    print(f"{exported.form}; its logits differ from the adapter's by at most {exported.difference:.1e} of the largest one")
    print(f"of what the adapter changes {exported.lost:.1e} is lost in rounding")


def _push(args: argparse.Namespace) -> None:
    from isaerft_sweep.publish.hub import push
    from isaerft_sweep.results.finding import find_adapter

    exported = (args.folder / "config.json").is_file()
    folder = args.folder if exported else find_adapter(args.folder, args.metric)
    print(push(folder, args.repo, args.private, args.dry_run).as_text())


def _import(args: argparse.Namespace) -> None:
    from isaerft_sweep.publish.legacy import import_folder

    imported = import_folder(args.folder, args.out, args.base)
    print(imported.folder)
    print(f"{imported.kind} at layer {', '.join(map(str, imported.layers))} of {imported.base}{imported.summary}")


def _generate(args: argparse.Namespace) -> None:
    from isaerft_sweep.results.finding import find_adapter
    from isaerft_sweep.results.samples import PROMPTS

    adapter = find_adapter(args.folder, args.metric)
    from isaerft_sweep.adapter.generate import compare

    _quiet()

    for prompt, before, after in compare(str(adapter), args.prompt or PROMPTS, args.max_new_tokens, args.cache):
        print(f"\n> {prompt}\n\nwithout the adapter:\n{before}\n\nwith it:\n{after}", flush=True)


def _quiet() -> None:
    """Hide progress bars, and warnings that the user cannot act on."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    # PEFT queries gradient checkpointing through a deprecated name of transformers
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module="sae_lens|peft")
