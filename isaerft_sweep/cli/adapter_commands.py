"""The commands for one adapter: its card, try it, export it, publish it, import a published one."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from isaerft_sweep.cli.argument_types import add_metric_argument, add_prompt_arguments, strength
from isaerft_sweep.errors import FolderError


def add_adapter_commands(commands: Any) -> None:
    """Add the parsers of ``card``, ``export``, ``push``, ``import`` and ``generate``."""
    card = commands.add_parser("card", help="rewrite a trial's model card, if you like from your own template")
    card.add_argument("trial", type=Path, nargs="?", help="the folder of a finished trial, or of a sweep (its best trial)")
    card.add_argument("--template", type=Path, help="a Jinja template; start from the one that --fields prints")
    card.add_argument("--fields", action="store_true", help="print the template in use instead")
    add_metric_argument(card)
    card.set_defaults(run=_card)

    _add_export(commands)

    push = commands.add_parser("push", help="upload an adapter or an export to the Hub")
    push.add_argument("folder", type=Path, help="a trial's folder, a sweep's (its best trial), or an exported model")
    push.add_argument("--repo", help="ORG/NAME (default: the card's model name, under the token's owner)")
    push.add_argument("--private", action="store_true", help="create the repository as a private one")
    push.add_argument("--dry-run", action="store_true", help="check, and list what would be uploaded")
    add_metric_argument(push)
    push.set_defaults(run=_push)

    importer = commands.add_parser("import", help="read an adapter folder of the published project")
    importer.add_argument("folder", type=Path, help="with adapter_config.json, blocks_manifest.json and blocks_*.pt")
    importer.add_argument("--out", type=Path, help="the folder to make (default: imported/NAME)")
    importer.add_argument("--base", help="the base model, ORG/NAME, if the folder's name does not contain it")
    importer.set_defaults(run=_import)

    generate = commands.add_parser("generate", help="answer prompts with and without an adapter")
    generate.add_argument(
        "folder", type=Path, help="a trial's folder, its adapter folder, or a sweep's folder (its best trial)"
    )
    add_prompt_arguments(generate)
    generate.add_argument("--cache", default=None, help="the folder of converted models")
    add_metric_argument(generate)
    generate.set_defaults(run=_generate)


def _add_export(commands: Any) -> None:
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
    add_metric_argument(export)
    export.set_defaults(run=_export)


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
