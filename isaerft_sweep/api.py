"""The Python API: run a sweep, read its results, load its winner.

    import isaerft_sweep as isw

    sweep = isw.run(["model=tiny", "sweep=quick", "name=first"])
    sweep = isw.load_sweep("outputs/first")      # the same, later
    sweep.to_dataframe()
    model, tokenizer = sweep.best().load_model()

Importing it loads no torch; ``load_model`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isaerft_sweep.errors import FolderError

if TYPE_CHECKING:
    import pandas
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep: its parameters, metrics and files."""

    _entry: RankedTrial

    @property
    def name(self) -> str:
        """The run's name, such as ``run-gemma-2-2b-lr3.6e-05-beta0.2-20250228-2228``."""
        return self._entry.record.name

    @property
    def params(self) -> dict[str, Any]:
        """The swept values by config key: ``{"orpo.beta": 0.2, …}``."""
        return dict(self._entry.params)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation by their names in W&B: ``{"eval/log_odds_chosen": 0.1, …}``."""
        return dict(self._entry.metrics)

    @property
    def state(self) -> str:
        """``completed``, ``diverged``, ``pruned``, ``failed``, ``stopped``, ``running`` or ``queued``."""
        return self._entry.state

    @property
    def rank(self) -> int | None:
        """1 for the best trial; None unless the trial has completed."""
        return self._entry.rank

    @property
    def path(self) -> Path:
        """The trial's folder. Raises FolderError for a sweep that was read from W&B."""
        from isaerft_sweep.results.sweep_results import trial_of

        return trial_of(self._entry).path

    def history(self) -> list[dict[str, Any]]:
        """What the trial logged: one dict per row, with ``step``, ``time`` (seconds since the epoch) and metrics."""
        from isaerft_sweep.results.sweep_results import trial_of

        return trial_of(self._entry).read_metrics()

    def load_model(self, cache: str | None = None, dtype: str | None = None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The base model with the trial's adapter, ready to generate, and its tokenizer.

        Args:
            cache: the folder of converted models; None: the user's cache folder.
            dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``; None: the dtype of the training.

        Raises FolderError when the trial has no adapter, ModelError when the base model cannot be loaded.
        """
        from isaerft_sweep.results.finding import find_adapter

        adapter = find_adapter(self.path)
        from isaerft_sweep.adapter.load import load_model

        return load_model(str(adapter), cache=cache, dtype=dtype)


@dataclass(frozen=True)
class Sweep:
    """A sweep's results at the time it was loaded."""

    _read: SweepResults

    @property
    def name(self) -> str:
        """The name of the sweep's folder, or its id in W&B."""
        return self._read.name

    @property
    def metric(self) -> str:
        """The metric that the trials are ranked by."""
        return self._read.metric.name

    @property
    def goal(self) -> str:
        """``maximize`` or ``minimize``."""
        return self._read.metric.goal

    @property
    def trials(self) -> list[Trial]:
        """All trials: completed ones from best to worst, then the others in creation order."""
        return [Trial(entry) for entry in self._read.entries]

    def best(self) -> Trial:
        """The best trial. Raises FolderError when no trial has completed, or none meets the sweep's constraints."""
        return Trial(self._read.best())

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per trial, indexed by name: rank, state, params, metrics, whether they meet the sweep's constraints, the
        metric's expected value over seeds and pairs with its 95 % interval, the probability of being the best, and seconds
        of device time. What is not known is missing (``pandas.NA``)."""
        import pandas

        rows = [
            {
                "trial": entry.record.name,
                "rank": entry.rank,
                "state": entry.state,
                **entry.params,
                **entry.metrics,
                "meets_constraints": not entry.violation if entry.rank else None,
                "expected": entry.expected,
                "low_95": entry.interval[0] if entry.interval else None,
                "high_95": entry.interval[1] if entry.interval else None,
                "probability_best": entry.probability_best,
                "device_s": entry.device_s,
            }
            for entry in self._read.entries
        ]
        table = pandas.DataFrame(rows).set_index("trial")
        numbers = dict.fromkeys(("expected", "low_95", "high_95", "probability_best", "device_s"), "Float64")
        return table.astype({"rank": "Int64", "meets_constraints": "boolean", **numbers})


def load_sweep(source: str | Path, metric: str | None = None, prefer: Mapping[str, float] | None = None) -> Sweep:
    """Load a sweep from a folder (``outputs/NAME``) or W&B (``wandb:ENTITY/PROJECT/ID``), also while it runs.

    ``metric``: rank by this metric instead of the sweep's own. ``prefer``: weights of the goals of a sweep with several,
    such as ``{"eval/kl_base": 2}``. Raises FolderError when there is no sweep, SpaceError when
    no trial logs that metric.
    """
    from isaerft_sweep.results.from_wandb import read_any_sweep

    return Sweep(read_any_sweep(str(source), metric, prefer))


def run(overrides: Sequence[str] = ()) -> Sweep:
    """Run a sweep to its end in this process, as ``python -m isaerft_sweep.launch OVERRIDES`` does, and return its results.

    The same overrides resume a sweep that was stopped. Raises ConfigError, SpaceError, DataError or ModelError before the
    first trial when something is wrong, FolderError when no trial completed, KeyboardInterrupt when it was stopped.
    """
    from isaerft_sweep.config.boundary import to_definition
    from isaerft_sweep.config.compose import compose
    from isaerft_sweep.controller.run_controller import INTERRUPTED
    from isaerft_sweep.controller.run_sweep import run_sweep
    from isaerft_sweep.controller.sweep_identity import sweep_folder

    experiment = compose(overrides)
    folder = sweep_folder(experiment, to_definition(experiment.sweep, experiment))
    code = run_sweep(experiment, overrides)
    if code == INTERRUPTED:
        raise KeyboardInterrupt(f"the sweep in {folder.path} was stopped; the same call resumes it.")
    sweep = load_sweep(folder.path)
    if not any(trial.rank for trial in sweep.trials):
        raise FolderError(f"the sweep in {folder.path} has ended without a completed trial: {sweep._read.why_unranked()}")
    return sweep
