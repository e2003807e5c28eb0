"""The controller's own processor time per trial, with trials that do nothing.

    python benchmarks/controller.py [--trials 100 1000 10000] [--methods random bayes]

Everything of the controller is real: sampler, names, journal with fsync, trial folders, polling, settling. Only the job is
not: a stand-in at the process boundary writes the worker's last status at once.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from isaerft_sweep.config.boundary import to_definition, to_experiment
from isaerft_sweep.config.schema import register
from isaerft_sweep.controller.build import make_sampler, make_state
from isaerft_sweep.controller.loop import Silent, SweepController
from isaerft_sweep.controller.sweep_identity import open_journal, sweep_fingerprint, sweep_folder
from isaerft_sweep.controller.trial_factory import TrialFactory, new_sweep_id
from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.dispatch.job import TrialJob
from isaerft_sweep.journal.job_refs import LocalJob
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status_writer import StatusWriter
from isaerft_sweep.paths import folder


class InstantDispatcher(Dispatcher):
    """Stands in for processes: a job is over when it is submitted."""

    slots = 8
    threads = None

    def submit_all(self, jobs: Sequence[TrialJob]) -> list[LocalJob]:
        return [self._start(job) for job in jobs]

    def _start(self, job: TrialJob) -> LocalJob:
        StatusWriter(TrialFolder(Path(job.folder)), job.attempt).write(TrialState.COMPLETED, metric=0.5, ended=time.time())
        return LocalJob(1)

    def alive(self, refs: Iterable[LocalJob]) -> list[bool]:
        return [False for _ in refs]

    def cancel(self, refs: Sequence[LocalJob]) -> None: ...

    def kill(self, refs: Sequence[LocalJob]) -> None: ...

    def log_tail(self, ref: LocalJob, lines: int = 8) -> str:
        return ""


def measure(trials: int, method: str, output: str) -> tuple[float, float]:
    """Processor and wall milliseconds per trial of one sweep of ``trials``."""
    with initialize_config_dir(str(folder("conf")), version_base="1.3"):
        asked = ["model=tiny", "sweep=reference-bayes", f"sweep.method={method}", f"sweep.run_cap={trials}"]
        place = [f"output={output}", f"name=s{trials}", "launcher.poll_s=0.000001"]
        experiment = to_experiment(compose("config", [*asked, *place]))
    definition = to_definition(experiment.sweep, experiment)
    where = sweep_folder(experiment, definition)
    journal = open_journal(where, [sweep_fingerprint(experiment, definition)])
    journal.write("sweep", sweep_id=new_sweep_id(), question="q", metric="eval/loss", goal="minimize")
    factory = TrialFactory(experiment, definition, where, "s", None)
    sampler = make_sampler(experiment, definition)
    sampler.ask()  # scipy's and Optuna's import are paid once, not per trial
    sampler = make_sampler(experiment, definition)
    state = make_state(journal, sampler, factory, trials)
    state.restore()
    controller = SweepController(state, where, InstantDispatcher(), experiment.launcher, Silent(), lambda: 0)
    cpu, wall = time.process_time(), time.perf_counter()
    controller.run()
    spent = time.process_time() - cpu, time.perf_counter() - wall
    journal.close()
    assert sum(r.state == TrialState.COMPLETED for r in journal.record.trials.values()) == trials
    return spent[0] / trials * 1e3, spent[1] / trials * 1e3


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 1000, 10000])
    parser.add_argument("--methods", nargs="*", default=["random", "bayes"])
    parser.add_argument("--bayes-up-to", type=int, default=1000, help="TPE's own cost grows with the history")
    args = parser.parse_args()
    register()
    table = Table(title=f"Controller, {platform.processor() or platform.machine()}, Python {platform.python_version()}")
    for name in ("method", "trials", "processor ms/trial", "wall ms/trial"):
        table.add_column(name, justify="right")
    for method in args.methods:
        for trials in args.trials:
            if method == "bayes" and trials > args.bayes_up_to:
                continue
            with tempfile.TemporaryDirectory() as output:
                cpu, wall = measure(trials, method, output)
            table.add_row(method, f"{trials:,}", f"{cpu:.2f}", f"{wall:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
