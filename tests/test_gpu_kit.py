"""The GPU kit, rehearsed on small shapes, without the packages that a machine with a GPU may lack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KIT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
ABSENT = ("datasets", "wandb", "hydra", "omegaconf", "submitit", "trl", "sae_lens", "optuna", "pyarrow")


def test_it_runs_and_its_numbers_are_the_plain_formulas(tmp_path: Path) -> None:
    code = (
        "import importlib.util, runpy, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {ABSENT!r}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "real = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] in {ABSENT!r} else real(name, *a)\n"
        f"sys.argv = ['gpu.py', '--tiny', '--steps', '1', '--out', {str(tmp_path / 'gpu.json')!r}]\n"
        f"runpy.run_path({str(KIT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["card"] and result["card"] in done.stdout
    for row in result["numbers"]:
        bound = 1e-5 if row["type"] == "torch.float32" else 0.03
        assert row["loss_error"] < bound and row["gradient_error"] < bound, row
    levels = [row["level"] for row in result["steps"]]
    assert levels[0] == "plain hook" and "8 trials a pass, one batch" in levels and levels[-1].startswith("the head alone")
    assert all(row["tokens_per_s"] > 0 and row["processor_s"] >= 0 for row in result["steps"])
