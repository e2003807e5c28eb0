"""The file names of sweeps and trials, and the protocol between controller and worker.

A trial's results are only in its own folder; a resident worker's task queue is in ``workers/`` (``worker_queue.py``), and
parts of checkpoints, W&B runs and caches have the names that their libraries give. Attempts are fenced: the controller
raises the attempt number before it dispatches a trial again, and a worker of an older attempt (an orphan of a node that
seemed dead) may not write any more.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from isaerft_sweep.errors import ConfigError, FolderError
from isaerft_sweep.journal.atomic_files import read_json, read_rows, write_json, write_text
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus, read_status_file
from isaerft_sweep.spec_fields import from_mapping, to_dict
from isaerft_sweep.specs import Experiment, TrialSpec


@dataclass
class PairScores:
    """Held-out pairs by name, with the mean log-probability per token of each chosen and rejected answer."""

    pairs: list[str] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)

    def add(self, pairs: list[str], chosen: list[float], rejected: list[float]) -> None:
        self.pairs += pairs
        self.chosen += chosen
        self.rejected += rejected


@dataclass(frozen=True)
class SweepFolder:
    """``outputs/<sweep>``: the settings, the journal and the trials.

    A sweep that agents run has one such folder per run, ``outputs/<sweep id>/<run id>``, since agents on many machines share
    it and a journal has one writer. ``names_root``: the folder in which run names must be unique; None: the parent folder.
    """

    path: Path
    names_root: Path | None = None

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def definition(self) -> Path:
        return self.path / "sweep.yaml"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def files(self) -> Path:
        """Digests of the files that the trials read, from the sweep's start; see ``controller/sweep_identity.py``."""
        return self.path / "files.json"

    @property
    def leaderboard(self) -> Path:
        return self.path / "leaderboard.csv"

    @property
    def samples(self) -> Path:
        """Answers of the untrained, the best and the worst model; see ``results/samples.py``."""
        return self.path / "samples.json"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def workers(self) -> Path:
        """The task queues of resident workers; see ``journal/worker_queue.py``."""
        return self.path / "workers"

    @property
    def controller(self) -> Path:
        """The process that runs the sweep; see ``controller/controller_info.py``."""
        return self.path / "controller.json"

    @property
    def prior(self) -> Path:
        """Results of earlier sweeps that this one's search learns from; see ``controller/prior.py``."""
        return self.path / "prior.json"

    @property
    def why_ended(self) -> Path:
        """Why the sweep has ended before its last trial, as text; is there only once it has."""
        return self.path / "ended.txt"

    @property
    def controller_log(self) -> Path:
        """The output of a controller in the background."""
        return self.path / "controller.log"

    @property
    def cancel(self) -> Path:
        """Asks the controller, wherever it runs, to stop; see ``controller/stop_signal.py``."""
        return self.path / "cancel"

    @property
    def retry(self) -> Path:
        """Requests to retry trials that were given up: one file each, named by the trial's index."""
        return self.path / "retry"

    def ask_to_retry(self, index: int) -> None:
        self.retry.mkdir(exist_ok=True)
        (self.retry / str(index)).touch()

    def take_retries(self) -> list[int]:
        """Indices of the trials to retry; removes the requests. Called by the controller."""
        if not self.retry.is_dir():
            return []
        indices = sorted(int(path.name) for path in self.retry.iterdir() if path.name.isdecimal())
        for index in indices:
            (self.retry / str(index)).unlink(missing_ok=True)
        return indices

    @property
    def static_array(self) -> Path:
        """Exists when trials were created ahead for a SLURM array; holds the path of the code that they run with."""
        return self.path / ".made"

    @property
    def checked(self) -> Path:
        """Exists once model, SAE and data of a sweep that agents run have been checked."""
        return self.path / ".checked"

    @property
    def first_run(self) -> Path:
        """Holds the id of the run that evaluates the untrained model, of a sweep that agents run."""
        return self.path / ".first"

    def claim_of_first_run(self, run_id: str) -> Path:
        """What a run links to ``first_run``: the first link wins."""
        return self.path / f".first-{run_id}"

    @property
    def names(self) -> Path:
        """Reserved run names, shared by all sweeps of one output folder."""
        return (self.names_root or self.path.parent) / ".names"

    def agent_run_folders(self) -> list[SweepFolder]:
        """The folders of the sweep's runs when agents run it; else none."""
        if self.journal.exists() or not self.path.is_dir():
            return []
        folders = (
            SweepFolder(path, self.path.parent) for path in sorted(self.path.iterdir()) if not path.name.startswith(".")
        )
        return [folder for folder in folders if folder.journal.is_file() and folder.belongs_to(self.path.name)]

    def belongs_to(self, sweep_id: str) -> bool:
        """Whether the journal is that sweep's."""
        with self.journal.open("rb") as file:
            first = file.readline()
        try:
            return bool(json.loads(first).get("sweep_id") == sweep_id)
        except (ValueError, AttributeError):
            return False

    def read_config(self) -> Experiment:
        """The composed config. Raises FolderError when there is none that can be read."""
        if not self.config.is_file():
            raise FolderError(
                f"{self.path} must have a config.yaml, but its sweep ended before any trial began (a check that failed, or "
                "Ctrl-C). Give the sweep's command again."
            )
        try:
            experiment: Experiment = from_mapping(Experiment, yaml.safe_load(self.config.read_text(encoding="utf-8")), "")
            return experiment
        except (OSError, yaml.YAMLError, ConfigError, TypeError, AttributeError) as error:
            raise FolderError(f"{self.config} must hold the sweep's config but cannot be read: {error}.") from error

    def trial(self, name: str) -> TrialFolder:
        return TrialFolder(self.path / "trials" / name)


@dataclass(frozen=True)
class TrialFolder:
    """``trials/<run name>``."""

    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def attempt(self) -> Path:
        return self.path / "attempt.json"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        """The scores of every held-out pair, of the untrained model and at the last evaluation."""
        return self.path / "evaluation.json"

    @property
    def latents(self) -> Path:
        """Statistics of the adapter's latents; see ``trial/latent_statistics.py``."""
        return self.path / "latents.npz"

    @property
    def gradients(self) -> Path:
        """With ``sweep.emulate``, what its training recorded; see ``trial/gradient_record.py``."""
        return self.path / "gradients.npz"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def unfinished_adapter(self, attempt: int) -> Path:
        """Where an attempt writes the adapter before it renames the whole folder."""
        return self.path / f".adapter-{attempt}"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def card_digest(self) -> Path:
        """A hash of the card as this package wrote it: with another hash a user has edited the card."""
        return self.path / ".card.sha256"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def log(self) -> Path:
        return self.path / "log.out"

    def create(self, spec: TrialSpec) -> None:
        """Make the folder and write the spec. Safe to call again after a crash."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            write_json(self.spec, to_dict(spec))
        except OSError:  # a full disk: leave no folder of a trial that does not exist
            with suppress(OSError):
                self.path.rmdir()
            raise

    def read_spec(self) -> TrialSpec:
        return TrialSpec.from_json(json.loads(self.spec.read_text(encoding="utf-8")))

    @property
    def analysis(self) -> Path:
        """The adapter at other strengths, and its latents; see ``results/analysis.py``."""
        return self.path / "analysis.json"

    def note_scores(self, step: int, scores: PairScores, pairs: str = "") -> None:
        """Save the scores of an evaluation: the untrained model's (step 0) or the latest. ``pairs``: ``test`` or empty."""
        evaluations = self.read_evaluation()
        name = "_".join(filter(None, [pairs, "untrained" if step == 0 else "trained"]))
        evaluations[name] = {"step": step, **dataclasses.asdict(scores)}
        write_json(self.evaluation, evaluations)

    def read_evaluation(self) -> dict[str, Any]:
        """``untrained``, ``trained``, ``test_untrained``, ``test_trained``, each with step, pairs, chosen and rejected."""
        return read_json(self.evaluation) or {}

    def begin_attempt(self, number: int) -> None:
        """Fence off every earlier attempt, and remove an old request to stop. Called by the controller."""
        self.stop.unlink(missing_ok=True)
        write_json(self.attempt, {"attempt": number})

    def current_attempt(self) -> int:
        return int((read_json(self.attempt) or {"attempt": 0})["attempt"])

    def ask_to_stop(self, state: TrialState = TrialState.STOPPED) -> None:
        """Ask the worker, wherever it runs, to write a checkpoint and end after its current step, in ``state``."""
        write_text(self.stop, state)

    def stop_requested(self) -> TrialState | None:
        """The state in which the worker should end; None without a request to stop."""
        try:
            return TrialState(self.stop.read_text(encoding="utf-8") or TrialState.STOPPED)
        except FileNotFoundError:
            return None

    def read_status(self) -> TrialStatus:
        """The worker's latest status; empty (false) before the first."""
        return read_status_file(self.status)

    def read_metrics(self) -> list[dict[str, Any]]:
        """One row per logged step: ``step``, ``time`` (seconds since the epoch) and metrics by W&B name."""
        return read_rows(self.metrics)
