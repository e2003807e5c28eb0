"""The package works when it is installed from a wheel, away from its checkout."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.long
def test_an_installed_wheel_finds_its_configs_sweeps_and_assets(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True
    )
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.stat().st_size < 10e6
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # the package comes from the wheel alone; its dependencies are seen where they are already installed
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    paths = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    ours = next(p for p in sys.path if p.endswith("site-packages"))
    dependencies = "\n".join(p for p in [ours] if p)
    (Path(paths.stdout.strip()) / "dependencies.pth").write_text(dependencies + "\n")
    command = [
        str(python.parent / "isaerft-launch"),
        "model=tiny",
        "orpo.max_steps=1",
        "sweep.run_cap=1",
        "tracker=disabled",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "courtesy: 96 pairs to train on, 48 held out" in done.stdout
    where = "import isaerft_sweep.paths as r; print(r.folder('conf'), r.folder('sweeps'), r.folder('slurm'))"
    found = subprocess.run([python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert all(str(tmp_path) in path for path in found), "the wheel's own folders, not the checkout's"
