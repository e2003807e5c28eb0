"""Reports the end of a trial to W&B again, because its worker died before W&B had it, or W&B was unreachable.

As a command, ``TRIAL FOLDER``, it writes an offline run below FOLDER instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.tracking.wandb_run import WandbRun, open_run, summary_of


def report_late(trial: TrialFolder, aside: Path | None = None) -> None:
    """Send an ended trial's rows, summary and outcome to its W&B run; existing rows are not duplicated.

    ``aside``: a folder to write an offline run to instead.
    """
    spec, status = trial.read_spec(), trial.read_status()
    run = WandbRun(spec, aside, offline=True) if aside else open_run(spec, trial.path / "wandb")
    for row in trial.read_metrics():
        run.replay({name: value for name, value in row.items() if name not in ("step", "time")}, row["step"])
    if trial.adapter.is_dir():
        run.log_adapter(trial.adapter, spec.model_name)
    succeeded = status.state in (TrialState.COMPLETED, TrialState.PRUNED)
    run.finish(summary_of(status), exit_code=0 if succeeded else 1, preempted=status.state is TrialState.STOPPED)


if __name__ == "__main__":
    report_late(TrialFolder(Path(sys.argv[1])), Path(sys.argv[2]))
