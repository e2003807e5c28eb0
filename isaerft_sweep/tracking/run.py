"""One trial's W&B run: the same run id, name and sweep through every attempt and every mode."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from isaerft_sweep.plain import to_dict
from isaerft_sweep.specs import TrialSpec


class Run:
    """A run that nobody tracks (``tracker=disabled``), and the interface of one that somebody does."""

    url: str | None = None
    sweep_url: str | None = None
    offline_folder: str | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of one optimiser step."""

    def replay(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics that an earlier attempt logged, where this attempt's run does not have them."""

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Write the summary and end the run; ``exit_code`` 0 marks it finished, others failed."""


class WandbRun(Run):
    """A real W&B run. An outage is reported and never ends the trial."""

    _lost = False

    def __init__(self, spec: TrialSpec, folder: Path) -> None:
        import wandb

        tracker = spec.experiment.tracker
        folder.mkdir(parents=True, exist_ok=True)
        self._offline = tracker.mode == "offline"
        if self._offline:
            for older in folder.glob("wandb/offline-run-*"):  # the new one gets all that was logged: see replay
                shutil.rmtree(older, ignore_errors=True)
        self._run = wandb.init(
            id=spec.run_id,
            project=tracker.project,
            entity=tracker.entity,
            name=spec.name,
            group=spec.sweep_name,
            job_type="trial",
            tags=[tag[:64] for tag in spec.tags],
            config=run_config(spec),
            dir=str(folder),
            mode="online" if tracker.mode == "wandb" else "offline",
            resume="allow" if tracker.mode == "wandb" else None,
            reinit="create_new",  # trials of one process may run at the same time
            # not by the environment: wandb reads that once per process
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, sweep_id=spec.sweep_id),
        )
        self.url = self._run.url if tracker.mode == "wandb" else None
        self.sweep_url = self._run.sweep_url if tracker.mode == "wandb" else None
        self.offline_folder = str(Path(self._run.dir).parent) if tracker.mode == "offline" else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._shielded(lambda: self._run.log(dict(metrics), step=step))

    def replay(self, metrics: Mapping[str, float], step: int) -> None:
        if self._offline:
            self.log(metrics, step)

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self._shielded(lambda: self._run.summary.update(dict(summary)))
        self._shielded(lambda: self._run.finish(exit_code=exit_code))

    def _shielded(self, call: Callable[[], Any]) -> None:
        if self._lost:
            return
        try:
            call()
        except Exception as error:  # wandb raises many kinds; none of them may cost a trial
            self._lost = True
            print(f"W&B is lost ({error}); the rest of this attempt is not tracked there.", file=sys.stderr, flush=True)


def open_run(spec: TrialSpec, folder: Path) -> Run:
    """The run that the tracker config asks for."""
    if spec.experiment.tracker.mode == "disabled":
        return Run()
    try:
        return WandbRun(spec, folder)
    except Exception as error:  # wandb raises many kinds; none of them may cost a trial
        print(f"W&B could not be reached ({error}); this attempt is not tracked there.", file=sys.stderr, flush=True)
        return Run()


def run_config(spec: TrialSpec) -> dict[str, Any]:
    """The run's config in W&B: nested as in Hydra, each value once."""
    sections = {name: to_dict(getattr(spec.experiment, name)) for name in ("model", "data", "adapter", "orpo")}
    return {**sections, "trial": {"index": spec.index, "identity": spec.identity, "git_commit": spec.git_commit}}
