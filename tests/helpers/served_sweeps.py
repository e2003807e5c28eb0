"""A sweep for W&B agents, and what its runs say of themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from helpers.serving import Serving
from helpers.waiting import wait_for

SWEEP = """\
program: isaerft_sweep/launch.py
method: grid
metric: {{name: eval/nll_loss, goal: minimize}}
{early}
parameters:
  orpo.learning_rate: {{values: {rates}}}
  orpo.beta: {{value: 1.0}}
command: ["${{env}}", "${{interpreter}}", -m, isaerft_sweep.launch, sweep=none, sweep.file={file}, {options}, "${{args_no_hyphens}}"]
"""


def sweep_file(folder: Path, options: tuple[str, ...], rates: tuple[float, ...], early: str = "") -> Path:
    """A sweep of one trial for each learning rate."""
    file = folder / "s.yaml"
    values = ", ".join(f"{rate:.2e}" for rate in rates)  # YAML takes 1e-07 for a word
    file.write_text(SWEEP.format(file=file, options=", ".join(options), rates=f"[{values}]", early=early))
    return file


def stepping(folder: Path, run: str, least: int = 2) -> dict[str, Any] | None:
    for path in folder.glob(f"outputs/*/{run}/trials/*/status.json"):
        try:
            status: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        if status["state"] == "running" and status.get("step", 0) >= least:
            return status
    return None


READ = """
import json, sys, wandb
api = wandb.Api()
sweep = api.sweep(sys.argv[1])
runs = {}
for run in sweep.runs:
    rows = list(run.scan_history())
    runs[run.id] = dict(name=run.name, state=run.state, steps=[r["_step"] for r in rows], config=dict(run.config),
                        summary=dict(run.summary._json_dict), tags=run.tags, group=run.group, job=run.job_type)
print(json.dumps(dict(state=sweep.state, runs=runs, best=sweep.best_run().id, expected=sweep.expected_run_count)))
"""


def read_sweep(serving: Serving, path: str) -> dict[str, Any]:
    done = serving.run(sys.executable, "-c", READ, path)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def trial_id(serving: Serving, path: str, index: int) -> str:
    """The run id of the sweep's trial of that number, once it was handed out."""
    wait_for(lambda: [e for e in serving.journal(path) if e["event"] == "dispatch" and e["index"] == index])
    return str(next(e["run_id"] for e in serving.journal(path) if e["event"] == "trial" and e["index"] == index))
