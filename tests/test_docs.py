"""The documentation: its blocks run as printed, its links lead somewhere, its reference is what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isaerft_sweep.search.parameters import DISTRIBUTIONS
from isaerft_sweep.search.sweep_file import EARLY_KEYS, METHODS, METRIC_KEYS, SCHEDULER_KEYS, TOP_KEYS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_reference_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_sites_contents(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert {path.parent.name for path in (tmp_path / "site").glob("*/index.html")} >= pages


def test_options_have_a_meaning() -> None:
    rows = [line for line in (ROOT / "docs" / "reference-config.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    assert [row for row in rows if row.rstrip(" |").endswith("|") or not row.split("|")[-2].strip()] == []


@pytest.mark.slow
@pytest.mark.long
def test_the_tutorial_runs_as_printed(tmp_path: Path) -> None:
    """From own pairs to an export and a dry push, with the tiny model."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for kind, code in BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")):
        command = ["bash", "-euo", "pipefail", "-c", code] if kind == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "outputs" / "first" / "report.html").is_file()


def test_the_sweep_files_reference_has_every_key() -> None:
    words = set(re.findall(r"[a-z_]+", (ROOT / "docs" / "reference-sweep-file.md").read_text(encoding="utf-8")))
    keys = {*TOP_KEYS, *METRIC_KEYS, *SCHEDULER_KEYS, *METHODS, *(key for keys in EARLY_KEYS.values() for key in keys)}
    missing = {*keys, *DISTRIBUTIONS} - words
    assert not missing, missing
