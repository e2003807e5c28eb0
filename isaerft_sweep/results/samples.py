"""Answers of the untrained model, the best and the worst trial side by side; stored in the sweep's folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.results.axes import params_text
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults, trial_of
from isaerft_sweep.results.torch_process import request

PROMPTS = (
    "My parcel has not arrived yet. What can I do?",
    "How do I keep basil alive in my kitchen?",
    "I have to give a short talk next week and I am nervous.",
)


def make_samples(sweep: SweepResults, prompts: Sequence[str], max_new_tokens: int) -> Mapping[str, Any]:
    """Generate the answers and write ``samples.json``. Raises FolderError or ModelError when that fails."""
    if sweep.folder is None:
        raise FolderError("answers need a sweep in a folder, since its adapters are there. Use the sweep's folder.")
    entries = {"best": sweep.best()}
    worst = [entry for entry in sweep.entries if entry.rank][-1]
    if worst.rank != 1:
        entries["worst"] = worst
    content = {
        "adapters": [str(trial_of(entry).adapter) for entry in entries.values()],
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "cache": sweep.experiment.cache if sweep.experiment else None,
    }
    samples = {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "max_new_tokens": max_new_tokens,
        "trials": {role: entry.record.name for role, entry in entries.items()},
        "columns": ["untrained", *(_title(role, entry, sweep) for role, entry in entries.items())],
        "prompts": [
            {"prompt": row[0], "answers": row[1:]}
            for row in request("isaerft_sweep.adapter.generate", content, "generates answers")
        ],
    }
    write_json(sweep.folder.samples, samples)
    return samples


def stale(samples: Mapping[str, Any], sweep: SweepResults) -> bool:
    """Whether the best trial is now, or by this metric, another one than in the samples."""
    best = sweep.winner
    return best is not None and samples.get("trials", {}).get("best") != best.record.name


def as_text(samples: Mapping[str, Any]) -> str:
    """The answers for a terminal."""
    lines = []
    for row in samples["prompts"]:
        lines.append(f"> {row['prompt']}\n")
        lines += [f"{title}:\n{answer}\n" for title, answer in zip(samples["columns"], row["answers"], strict=True)]
    return "\n".join(lines)


def _title(role: str, entry: RankedTrial, sweep: SweepResults) -> str:
    params = params_text(entry.params, sweep.columns)
    return f"{role} by {sweep.metric.name}: trial {entry.record.index + 1}" + (f" ({params})" if params else "")
