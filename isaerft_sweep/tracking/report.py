"""Tells W&B again how a trial has ended: its worker may have died between its own last word and W&B's."""

from __future__ import annotations

from isaerft_sweep.journal.folders import COMPLETED, TrialFolder
from isaerft_sweep.tracking.run import open_run


def report_again(trial: TrialFolder) -> None:
    """Give an ended trial's rows, summary and outcome to its W&B run; what is there already is not doubled."""
    spec, status = trial.read_spec(), trial.read_status()
    run = open_run(spec, trial.path / "wandb")
    for row in trial.read_metrics():
        run.replay({name: value for name, value in row.items() if name not in ("step", "time")}, row["step"])
    if trial.adapter.is_dir():
        run.log_adapter(trial.adapter, spec.model_name)
    completed = status.get("state") == COMPLETED
    run.finish({**(status.get("metrics") or {}), "state": status.get("state")}, exit_code=0 if completed else 1)
