"""One trial's W&B run, with the same run id, name and sweep in every attempt and mode."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import TrialSpec

FINISH_S = 100.0
"""How long W&B may take to upload the rest of a run; the controller ends a worker that is over and stays for 120 s."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


class Run:
    """An untracked run (``tracker=disabled``), and the interface of a tracked one."""

    url: str | None = None
    sweep_url: str | None = None
    offline_folder: str | None = None
    lost = False
    """Whether W&B misses data because its process died: SLURM sends signals to every process of a step."""
    can_receive_stop = False
    """Whether W&B can request the trial to stop, by interrupting the process."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one optimiser step."""

    def replay(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of an earlier attempt, unless this run has them already."""

    def log_adapter(self, folder: Path, name: str) -> None:
        """Log the finished adapter as an artifact."""

    def finish(self, summary: Mapping[str, Any], exit_code: int, preempted: bool = False) -> None:
        """Write the summary and end the run; ``exit_code`` 0 marks it finished, others failed, or ``preempted``."""


class WandbRun(Run):
    """A real W&B run. An outage is reported and never ends the trial."""

    live: ClassVar[int] = 0
    """Number of open runs in this process."""
    services: ClassVar[int] = 0
    """Number of W&B service processes of this process that died."""

    def __init__(self, spec: TrialSpec, folder: Path, offline: bool) -> None:
        import wandb

        tracker = spec.experiment.tracker
        folder.mkdir(parents=True, exist_ok=True)
        self._offline = offline
        if offline:
            for older in folder.glob("wandb/offline-run-*"):  # the new one gets all rows: see replay
                shutil.rmtree(older, ignore_errors=True)
        # the ids are arguments of init, since several trials may run in one process: an agent's ids in the environment
        # would apply to all of them, and its parameter file would duplicate every swept value in the config
        for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
            os.environ.pop(name, None)
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
            mode="offline" if offline else "online",
            resume=None if offline else "allow",
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, sweep_id=spec.sweep_id, **_time_to_finish()
            ),
        )
        WandbRun.live += 1
        self._service = WandbRun.services
        self.can_receive_stop = not offline
        self.url = None if offline else self._run.url
        self.sweep_url = None if offline else self._run.sweep_url
        self.offline_folder = str(Path(self._run.dir).parent) if offline else None
        self._from_step = 0 if offline else int(self._run.starting_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._shielded(lambda: self._run.log(dict(metrics), step=step))

    def replay(self, metrics: Mapping[str, float], step: int) -> None:
        # W&B has the rows that it received; it may lack the last rows of an attempt that was killed
        if step >= self._from_step:
            self.log(metrics, step)

    def log_adapter(self, folder: Path, name: str) -> None:
        import wandb

        def log() -> None:
            artifact = wandb.Artifact(name[:128], type="model")
            for file in ADAPTER_FILES:
                artifact.add_file(str(folder / file), policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact)

        if self.lost:
            return
        try:
            log()
        except Exception as error:  # this calls W&B immediately: an outage must not prevent the run's end
            print(f"the adapter is not in W&B ({error}); it lies in {folder}.", file=sys.stderr, flush=True)

    def finish(self, summary: Mapping[str, Any], exit_code: int, preempted: bool = False) -> None:
        self._shielded(lambda: self._run.summary.update(dict(summary)))
        if preempted:
            self._shielded(self._run.mark_preempting)
        self._shielded(lambda: self._run.finish(exit_code=exit_code))
        WandbRun.live -= 1

    def _shielded(self, call: Callable[[], Any]) -> None:
        if self.lost:
            return
        try:
            call()
        except Exception as error:  # wandb raises many kinds; none may fail a trial
            self.lost = True
            print(f"W&B is lost ({error}); `isaerft-sweep sync` uploads the rest of this attempt.", file=sys.stderr)
            if isinstance(error, ConnectionError) and self._service == WandbRun.services:
                WandbRun.services += 1
                _end_service()  # dead: the next trial needs another one, and wandb would print a traceback at exit


def summary_of(status: TrialStatus) -> dict[str, Any]:
    """A W&B run's final summary: metrics, state, and seconds, since W&B measures none for a later upload."""
    time = {} if status.seconds is None else {"seconds": status.seconds}
    return {**status.metrics, "state": str(status.state), **time}


def open_run(spec: TrialSpec, folder: Path) -> Run:
    """The run for the configured tracker mode; offline when W&B does not answer."""
    mode = spec.experiment.tracker.mode
    if mode == "disabled":
        return Run()
    for offline in (False, True) if mode == "wandb" else (True,):
        try:
            return WandbRun(spec, folder, offline)
        except Exception as error:  # wandb raises many kinds; none may fail a trial
            fallback = "it is kept on disk, for `isaerft-sweep sync`" if not offline else "this attempt is not tracked"
            print(f"W&B could not be reached ({error}); {fallback}.", file=sys.stderr, flush=True)
            _drop_failed_start()
    return Run()


def _time_to_finish() -> dict[str, Any]:
    """Settings that limit the final upload: one that hangs must not block trials in the same process. Not in older wandb."""
    import wandb

    if "finish_timeout" not in wandb.Settings.model_fields:
        return {}
    limit = {} if "WANDB_FINISH_TIMEOUT" in os.environ else {"finish_timeout": FINISH_S}
    return {**limit, "finish_timeout_raises": True}


def _drop_failed_start() -> None:
    """End wandb's service, which keeps the id of a run that failed to start, unless other trials use it."""
    if WandbRun.live == 0:
        _end_service()


def _end_service() -> None:
    import wandb

    with suppress(Exception):
        wandb.teardown()


def run_config(spec: TrialSpec) -> dict[str, Any]:
    """The run's config in W&B, nested as in Hydra."""
    sections = {name: to_dict(getattr(spec.experiment, name)) for name in ("model", "data", "adapter", "orpo")}
    return {**sections, "trial": {"index": spec.index, "identity": spec.identity, "git_commit": spec.git_commit}}
