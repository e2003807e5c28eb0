"""Resolves a folder from the command line to the trial or adapter in it."""

from __future__ import annotations

import sys
from pathlib import Path

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.results.reading import is_sweep, read_sweep_folder
from isaerft_sweep.results.standing import Standing, standings
from isaerft_sweep.results.sweep_results import trial_of


def find_trial(folder: Path, metric: str | None = None) -> tuple[TrialFolder, Standing | None]:
    """The completed trial in ``folder``, with its standing in its sweep.

    ``folder`` is a trial's, its adapter's, or a sweep's (its best trial). ``metric``: ranks a sweep's trials; None: the
    sweep's own. Raises FolderError when ``folder`` has no completed trial.
    """
    path = folder.expanduser().absolute()
    if is_sweep(path):
        path = _best(path, metric).path
    elif path.name == "adapter" and (path.parent / "spec.json").is_file():
        path = path.parent
    trial = TrialFolder(path)
    if not trial.spec.is_file():
        raise FolderError(f"'{folder}' must be the folder of a finished trial or of a sweep, but it is neither.")
    state = trial.read_status().state or "not begun"
    if state != TrialState.COMPLETED or not (trial.adapter / "adapter_config.json").is_file():
        raise FolderError(
            f"the trial in {path} must be completed and have its adapter, but it is {state}. Run its sweep's command again."
        )
    return trial, _standing(trial)


def _standing(trial: TrialFolder) -> Standing | None:
    """The trial's standing in the sweep that contains it; None when it was moved out of its sweep's folder."""
    sweep = trial.path.parent.parent
    if not is_sweep(sweep):
        return None
    sweep = sweep.parent if is_sweep(sweep.parent) else sweep
    return next((s for entry, s in standings(read_sweep_folder(sweep)) if entry.folder == trial), None)


def _best(sweep: Path, metric: str | None) -> TrialFolder:
    """A sweep's best trial; prints the metric, and why its ranking may mislead, to standard error."""
    ranked = read_sweep_folder(sweep, metric)
    trial = trial_of(ranked.best())
    print(f"the best trial by {ranked.metric.name} (--metric: by another): {trial.path}", file=sys.stderr)
    for text in ranked.dependence:
        print(text, file=sys.stderr)
    return trial


def find_adapter(folder: Path, metric: str | None = None) -> Path:
    """The adapter of a trial or of a sweep's best trial by ``metric``, or the folder itself.

    Raises FolderError when there is no adapter.
    """
    if (folder / "adapter_config.json").is_file():
        return folder
    if (folder / "adapter" / "adapter_config.json").is_file():
        return folder / "adapter"
    if is_sweep(folder):
        return _best(folder, metric).adapter
    raise FolderError(
        f"'{folder}' must be the folder of a finished trial, of an adapter or of a sweep, but it is none of them."
    )
