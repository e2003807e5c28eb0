"""Writes the files of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.atomic_files import write_text
from isaerft_sweep.results.leaderboard import write_csv
from isaerft_sweep.results.sweep_results import SweepResults


def write_report(
    sweep: SweepResults, out: Path | None = None, labels: Mapping[int | None, Path] | None = None
) -> tuple[Path, list[Path]]:
    """Write the page and the pictures; returns their paths.

    Args:
        sweep: a running or ended sweep.
        out: the folder for both; None: the sweep's own, or ``report-NAME`` in the current folder for a sweep of W&B.
        labels: files with labels of the SAE's latents, by layer; see ``gather``.

    Raises FolderError when plotly or matplotlib are not installed or the folder cannot be written.
    """
    try:
        from isaerft_sweep.results.report.gather import gather
        from isaerft_sweep.results.report.page import render
        from isaerft_sweep.results.report.pictures import write_pictures
    except ImportError as error:
        raise FolderError(
            f"a report needs the extra 'report', but {error.name} is not installed: pip install 'isaerft-sweep[report]'"
        ) from error
    folder = out or (sweep.folder.path if sweep.folder else Path(f"report-{re.sub(r'[^A-Za-z0-9._-]+', '-', sweep.name)}"))
    report = gather(sweep, labels)
    page = render(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.html", page)
        pictures = write_pictures(report, folder / "figures")
        write_csv(sweep, folder / "leaderboard.csv")
    except OSError as error:
        raise FolderError(
            f"the report cannot be written to {folder} ({error.strerror}). Choose another: --out DIR."
        ) from error
    return folder / "report.html", pictures
