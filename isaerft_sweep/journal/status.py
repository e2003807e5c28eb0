"""``status.json``: the state of a trial's attempt, written by its worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isaerft_sweep.journal.atomic_files import read_json, write_json
from isaerft_sweep.journal.states import FINAL, TrialState

OLD_NAMES = {"untold": "wandb_not_notified"}
"""Keys that an earlier version wrote."""


@dataclass(frozen=True)
class TrialStatus:
    """The worker's latest status; false before the first. Times are in seconds since the epoch."""

    attempt: int = 0
    state: TrialState | None = None
    host: str = ""
    pid: int | None = None
    started: float | None = None
    heartbeat: float = 0.0
    ended: float | None = None
    message: str = ""
    phase: str = ""
    """What it does now, for display: ``frozen layers 43 %``."""
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    metric: float | None = None
    """The sweep's metric at the last evaluation."""
    evaluations: tuple[float, ...] = ()
    """The sweep's metric at each evaluation after the first step."""
    trained_from: int = 0
    """The step at which this attempt began to train."""
    trained_since: float | None = None
    checkpoint: int = 0
    """The last step that a checkpoint was written after."""
    begun: bool = True
    """False when another trial's stop or error ended the worker before this one began."""
    user_error: bool = False
    """Whether it ended with a user's error, which another attempt would repeat."""
    wandb_not_notified: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    """At the trial's end, by W&B name."""
    untrained: Mapping[str, float] = field(default_factory=dict)
    """The untrained model's metrics, where this trial evaluated it."""
    seconds: float | None = None
    pairs: Mapping[str, Any] = field(default_factory=dict)
    """How many pairs were trained on, held out, left out and cut."""
    wandb: Mapping[str, Any] = field(default_factory=dict)
    """``url`` and ``sweep_url`` of the run, and whether it is ``offline``."""

    def __bool__(self) -> bool:
        return self.state is not None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def is_running(self) -> bool:
        return self.state is TrialState.RUNNING

    @property
    def duration_s(self) -> float:
        """Seconds from the attempt's start to its end or last heartbeat."""
        return (self.ended or self.heartbeat) - self.started if self.started is not None else 0.0

    def of_attempt(self, attempt: int) -> TrialStatus:
        """This status when it is that attempt's, else the empty one."""
        return self if self.attempt == attempt else NO_STATUS


NO_STATUS = TrialStatus()
_FIELDS = {field.name for field in dataclasses.fields(TrialStatus)}


def read_status_file(path: Path) -> TrialStatus:
    """The status in ``path``, empty when the file does not exist; keys of a newer version are ignored.

    Raises ValueError or TypeError when the content is not a status.
    """
    content = {OLD_NAMES.get(key, key): value for key, value in (read_json(path) or {}).items()}
    if not content:
        return NO_STATUS
    values = {key: value for key, value in content.items() if key in _FIELDS and value is not None}
    values["evaluations"] = tuple(values.get("evaluations", ()))
    values["heartbeat"] = float(values.get("heartbeat", 0.0))
    return TrialStatus(**{**values, "state": TrialState(content["state"])})


def write_status_file(path: Path, status: TrialStatus) -> None:
    """Replace the status in ``path`` atomically; fields with their default value are left out."""
    default = dataclasses.asdict(NO_STATUS)
    write_json(path, {key: value for key, value in dataclasses.asdict(status).items() if value != default[key]})
