"""Fixtures that several test modules use; tests/conftest.py registers them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.slurm_jobs import Site
from helpers.sweeps import add_latents, make_sweep, rows_for
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder

if TYPE_CHECKING:
    import torch


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What AdamW is given from now on, of all trained parameters in one vector, step by step."""
    import torch

    seen: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = [
            p.grad.detach().flatten().float().clone()
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        seen.append(torch.cat(found))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return seen


@pytest.fixture
def full_sweep(tmp_path: Path) -> SweepFolder:
    """Completed trials with curves and latents; one diverged, one failed, one that runs."""
    folder = make_sweep(tmp_path / "s", trials=8)
    names = [f"run-tiny-{i}" for i in range(8)]
    for name in names:
        rows_for(folder, name, 600)
    add_latents(folder, names)
    journal = Journal(folder)
    for i, (state, message) in enumerate(
        [
            ("diverged", "the loss rose to 1e9 at step 3. Try a smaller learning rate."),
            ("failed", "<script>alert(1)</script>"),
        ],
        8,
    ):
        params = {"orpo.learning_rate": 0.09, "orpo.beta": 0.4}
        journal.write("trial", index=i, name=f"run-lost-{i}", run_id=f"r{i}", params=params, unit={})
        journal.write("end", index=i, state=state, metric=None, message=message, seconds=7.0, given_up=state == "failed")
    journal.write(
        "trial", index=11, name="run-poor", run_id="r11", params={"orpo.learning_rate": 0.002, "orpo.beta": 0.2}, unit={}
    )
    journal.write("end", index=11, state="pruned", metric=0.0, message="", seconds=3.0, given_up=False)
    journal.write(
        "trial", index=10, name="run-now", run_id="r10", params={"orpo.learning_rate": 0.01, "orpo.beta": 0.1}, unit={}
    )
    journal.write("dispatch", index=10, attempt=1, job={"kind": "local", "pid": 1})
    folder.trial("run-now").path.mkdir(parents=True)
    write_json(folder.trial("run-now").status, {"state": "running", "attempt": 1})
    rows_for(folder, "run-now", 3)
    journal.close()
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return Site(folder)
