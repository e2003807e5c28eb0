"""Answers of the untrained model, the best and the worst trial side by side, kept in the sweep's folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from isaerft_sweep.errors import FolderError, ModelError
from isaerft_sweep.guard import of_process
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.results.axes import by_label
from isaerft_sweep.results.reading import Entry, ReadSweep, trial_of

PROMPTS = (
    "My parcel has not arrived yet. What can I do?",
    "How do I keep basil alive in my kitchen?",
    "I have to give a short talk next week and I am nervous.",
)


def make_samples(sweep: ReadSweep, prompts: Sequence[str], max_new_tokens: int) -> Mapping[str, Any]:
    """Ask the models and write ``samples.json``. Raises FolderError or ModelError when they cannot be asked."""
    if sweep.folder is None:
        raise FolderError("answers can only be made of a sweep in a folder, since the adapters are there.")
    shown = {"best": sweep.best()}
    worst = [entry for entry in sweep.entries if entry.rank][-1]
    if worst.rank != 1:
        shown["worst"] = worst
    request = {
        "adapters": [str(trial_of(entry).adapter) for entry in shown.values()],
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "cache": sweep.experiment.cache if sweep.experiment else None,
    }
    samples = {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "max_new_tokens": max_new_tokens,
        "trials": {word: entry.record.name for word, entry in shown.items()},
        "columns": ["untrained", *(_title(word, entry, sweep) for word, entry in shown.items())],
        "prompts": [{"prompt": row[0], "answers": row[1:]} for row in _ask(request)],
    }
    write_json(sweep.folder.samples, samples)
    return samples


def stale(samples: Mapping[str, Any], sweep: ReadSweep) -> bool:
    """Whether another trial is the best by now, or by this metric, than the one that answered."""
    best = next((entry for entry in sweep.entries if entry.rank == 1), None)
    return best is not None and samples.get("trials", {}).get("best") != best.record.name


def as_text(samples: Mapping[str, Any]) -> str:
    """The answers for a terminal."""
    lines = []
    for row in samples["prompts"]:
        lines.append(f"> {row['prompt']}\n")
        lines += [f"{title}:\n{answer}\n" for title, answer in zip(samples["columns"], row["answers"], strict=True)]
    return "\n".join(lines)


def _title(word: str, entry: Entry, sweep: ReadSweep) -> str:
    words = by_label(entry.params, sweep.columns)
    return f"{word} by {sweep.metric.name}: trial {entry.record.index + 1}" + (f" ({words})" if words else "")


def _ask(request: Mapping[str, Any]) -> list[list[str]]:
    """The rows of ``adapter.generate``, from a process of its own: this one never loads torch."""
    command = [sys.executable, "-m", "isaerft_sweep.adapter.generate"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    try:
        told = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ModelError(f"the process that answers {of_process(done)}") from error
    if "error" in told:
        raise ModelError(told["error"])
    rows: list[list[str]] = told["ok"]
    return rows
