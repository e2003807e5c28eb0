"""The commands around a running sweep: plan it, check the site, leave it, attach to it, cancel it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from isaerft_sweep.terminal import make_console


def add_sweep_commands(commands: Any) -> None:
    """Add the parsers of ``status``, ``logs``, ``plan`` and the others."""
    status = commands.add_parser("status", help="a sweep's progress, its controller, and the trials that run")
    status.add_argument("sweep", type=Path, help="the sweep's folder, outputs/NAME; or outputs, for all sweeps in it")
    status.add_argument("--json", action="store_true", help="everything as JSON, for programs")
    status.set_defaults(run=_status)

    logs = commands.add_parser("logs", help="a trial's output, with the whole traceback when it failed")
    logs.add_argument("sweep", type=Path, help="the sweep's folder, outputs/NAME")
    logs.add_argument("trial", help="its number as in the tables, its name or its run id")
    logs.add_argument("-f", "--follow", action="store_true", help="follow until the trial has ended")
    logs.set_defaults(run=_logs)

    retry = commands.add_parser("retry", help="run one failed trial again")
    retry.add_argument("sweep", type=Path, help="the sweep's folder, outputs/NAME")
    retry.add_argument("trial", help="its number as in the tables, its name or its run id")
    retry.set_defaults(run=_retry)

    attach = commands.add_parser("attach", help="follow a sweep; resume it when no controller runs it")
    attach.add_argument("sweep", type=Path, help="the sweep's folder, outputs/NAME")
    attach.add_argument(
        "--here", action="store_true", help="train on this machine without asking, if the sweep needs a controller"
    )
    attach.set_defaults(run=_attach)

    cancel = commands.add_parser("cancel", help="end a sweep's controller, trials and jobs; finished trials stay")
    cancel.add_argument("sweep", type=Path, help="the sweep's folder, outputs/NAME")
    cancel.add_argument("--now", action="store_true", help="kill, without time for a checkpoint")
    cancel.set_defaults(run=_cancel)

    plan = commands.add_parser("plan", help="preview a sweep: trials, space, time, jobs; submits nothing")
    _override_arguments(plan)
    plan.add_argument(
        "--calibrate", action="store_true", help="run a few steps of one trial through the launcher to estimate the time"
    )
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="check that the site is ready, also on a compute node, and suggest fixes")
    _override_arguments(doctor)
    doctor.add_argument(
        "--wait", type=float, default=600, metavar="SECONDS", help="how long to wait for the job (default 600)"
    )
    doctor.set_defaults(run=_doctor)

    fetch = commands.add_parser("fetch", help="fill the cache on the login node: compute nodes need no internet")
    _override_arguments(fetch)
    fetch.set_defaults(run=_fetch)

    make = commands.add_parser("make", help="make all trials of a sweep for slurm/trials.sbatch, without running any")
    _override_arguments(make)
    make.set_defaults(run=_make)

    trial = commands.add_parser("trial", help="run one trial that `make` wrote, as slurm/trials.sbatch does")
    trial.add_argument("sweep", type=Path, help="the sweep's folder, outputs/NAME")
    trial.add_argument("index", type=int, help="the trial's number, from 0")
    trial.set_defaults(run=_trial)


def _override_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="model=… sweep=…", help="as isaerft-launch takes them")


def _status(args: argparse.Namespace) -> None:
    from isaerft_sweep.controller.sweep_status import as_json, show_status

    if args.json:
        print(as_json(args.sweep))
    else:
        show_status(make_console(), args.sweep)


def _logs(args: argparse.Namespace) -> None:
    from isaerft_sweep.controller.logs import show_log

    show_log(args.sweep, args.trial, args.follow)


def _retry(args: argparse.Namespace) -> int:
    from isaerft_sweep.controller.retry import retry

    return retry(args.sweep, args.trial)


def _attach(args: argparse.Namespace) -> int:
    from isaerft_sweep.controller.session import attach

    return attach(args.sweep, args.here)


def _cancel(args: argparse.Namespace) -> int:
    from isaerft_sweep.controller.session import cancel

    return cancel(args.sweep, args.now)


def _plan(args: argparse.Namespace) -> None:
    from isaerft_sweep.config.compose import compose
    from isaerft_sweep.readiness.plan import plan

    plan(make_console(), compose(args.overrides), args.calibrate)


def _doctor(args: argparse.Namespace) -> int:
    from isaerft_sweep.config.compose import compose
    from isaerft_sweep.readiness.doctor import diagnose

    return diagnose(make_console(), compose(args.overrides), args.wait)


def _fetch(args: argparse.Namespace) -> None:
    from isaerft_sweep.config.compose import compose
    from isaerft_sweep.readiness.fetch import fetch

    resources = fetch(compose(args.overrides))
    print("\n".join([resources["model"], *resources["saes"], resources["data"]]))
    print("Everything is in the cache. For jobs without internet: export HF_HUB_OFFLINE=1 before you launch.")


def _make(args: argparse.Namespace) -> None:
    from isaerft_sweep.config.compose import compose
    from isaerft_sweep.controller.static_array import create_static_trials
    from isaerft_sweep.paths import folder as shipped
    from isaerft_sweep.paths import quoted
    from isaerft_sweep.results.leaderboard import short_path

    folder, trials = create_static_trials(compose(args.overrides), args.overrides)
    template = short_path(shipped("slurm") / "trials.sbatch")
    script, sweep = quoted(template), quoted(folder)
    print(f"{trials} trials are made. Run them:\n  sbatch --array=0-{trials - 1}%8 {script} {sweep}")
    print(f"then finish what is left, and rank them:\n  isaerft-sweep attach {sweep}")


def _trial(args: argparse.Namespace) -> int:
    from isaerft_sweep.controller.static_array import run_static_trial

    return run_static_trial(args.sweep, args.index)
