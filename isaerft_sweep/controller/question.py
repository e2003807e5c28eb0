"""What a sweep asks: two commands with the same question go on with the same sweep."""

from __future__ import annotations

import hashlib
from pathlib import Path

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.folders import SweepFolder
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.naming import clean
from isaerft_sweep.plain import canonical_json
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.specs import Experiment, identity


def question(experiment: Experiment, definition: SweepDefinition) -> str:
    """12 hex digits of all that decides which trials are run and what they compute.

    ``run_cap`` is left out: the same command with a larger one adds trials to the same sweep.
    """
    content = {
        "trial": identity(experiment),
        "method": definition.method,
        "metric": [definition.metric.name, definition.metric.goal],
        "parameters": {key: repr(d) for key, d in definition.parameters.items()},
        "seed": experiment.sweep.seed,
        "repeats": experiment.sweep.repeats,
        "files": [file_digest(path) for path in _local_files(experiment)],
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:12]


def _local_files(experiment: Experiment) -> list[Path]:
    """Files whose content decides what a trial computes, while the config has only their names."""
    data = experiment.data
    named = [data.path, data.eval_path] if data.source == "files" else []
    saes = [f"{site.sae_path}/sae_weights.safetensors" for site in experiment.adapter.sites if site.sae_path]
    return [Path(path).expanduser() for path in (*named, *saes) if path]


def file_digest(path: Path) -> str:
    """A hash of a file's content; empty when there is none (the preflight will say so)."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def sweep_folder(experiment: Experiment, definition: SweepDefinition) -> SweepFolder:
    """``output/name``; without a name, one made of the choices and the question."""
    name = experiment.name
    if name is None:
        parts = (experiment.sweep.name, experiment.model.short_name, experiment.data.name, experiment.adapter.kind)
        name = "-".join([*(clean(part).lower() for part in parts), question(experiment, definition)[:6]])
    elif clean(name) != name:
        raise FolderError(f"name must be usable as a folder name but got '{name}'. Try name={clean(name)}.")
    return SweepFolder(Path(experiment.output).expanduser().absolute() / name)


def open_journal(folder: SweepFolder, asked: str) -> Journal:
    """The journal of ``folder``, opened for the question ``asked``. Raises FolderError when the folder is another's."""
    ours = (folder.lock, folder.controller_log)
    if folder.path.is_dir() and not folder.journal.exists() and any(p not in ours for p in folder.path.iterdir()):
        raise FolderError(
            f"the output folder {folder.path} holds files but no sweep. Choose another name: name=NAME, or empty it."
        )
    journal = Journal(folder)
    if journal.record.question not in ("", asked):
        journal.close()
        raise FolderError(
            f"the output folder {folder.path} holds another sweep, with another model, data, space or setting "
            f"(its question is {journal.record.question}, this one's {asked}). Choose another name: name=NAME, or "
            "leave name out, and every question gets a folder of its own."
        )
    return journal
