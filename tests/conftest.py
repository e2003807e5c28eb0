"""What tests share: a cache for tiny models, composing configs, running the real commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from helpers import slurm_bed
from helpers.serving import Serving
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from isaerft_sweep import naming
from isaerft_sweep.config.boundary import to_experiment
from isaerft_sweep.config.schema import register
from isaerft_sweep.dispatch.job import importing
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.paths import folder
from isaerft_sweep.specs import Experiment, TrialSpec, identity

if TYPE_CHECKING:
    from helpers.serve_client import Client

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything loads torch
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's `make test &` leaves Ctrl-C off for all children
register()
pytest_plugins = ("helpers.fixtures",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-family", action="store_true", help="try all model families that transformers can build")


TINY = (
    "model=tiny",
    "data.train_size=24",
    "data.eval_size=8",
    "orpo.max_steps=4",
    "orpo.max_length=300",
    "launcher.poll_s=0.2",
    "launcher.threads=1",  # tests run beside each other, and threads that wait for each other spin
)
"""A trial of a few seconds: four steps of a tiny random model."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of tiny models, activations and checks for all tests, of all processes that run them."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def saes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A JumpReLU SAE (as Gemma Scope) and a TopK SAE whose decoder rescales, saved as sae_lens saves them."""
    import torch
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    jump = JumpReLUSAE(JumpReLUSAEConfig(d_in=64, d_sae=96))
    topk = TopKSAE(TopKSAEConfig(d_in=64, d_sae=96, k=8, rescale_acts_by_decoder_norm=True))
    folders = {}
    for name, sae in (("jumprelu", jump), ("topk", topk)):
        for parameter in sae.parameters():
            parameter.data = torch.randn_like(parameter) / 6
        if name == "jumprelu":
            sae.threshold.data = torch.rand(96) * 0.3
        folders[name] = str(tmp_path_factory.mktemp(name))
        sae.save_model(folders[name])
    return folders


@pytest.fixture(autouse=True)
def _cache_in_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISAERFT_CACHE", str(cache))
    for name in [n for n in os.environ if n.startswith("WANDB_") and n != "WANDB_SILENT"]:
        monkeypatch.delenv(name)


PACE = """
import builtins, os, time

said = builtins.print

def print_and_wait(*args, **kwargs):
    said(*args, **kwargs)
    if args and str(args[0]).startswith("step "):
        time.sleep(float(os.environ["TEST_PACE_S"]))

builtins.print = print_and_wait
"""
"""Stands in for a larger model in processes that import it: every step takes a while, and no processor time."""


@pytest.fixture
def paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that this test starts, in processes of their own or in jobs, take a quarter of a second a step."""
    folder = tmp_path / ".pace"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PACE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("TEST_PACE_S", "0.25")


@pytest.fixture
def experiment() -> Iterator[Callable[..., Experiment]]:
    """Compose a config from overrides, as the command line does."""

    def composed(*overrides: str) -> Experiment:
        with initialize_config_dir(str(folder("conf")), version_base="1.3"):
            return to_experiment(compose("config", list(overrides)))

    yield composed
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def _as_a_worker() -> None:
    """What a worker imports, as a worker imports it."""
    import hypothesis  # noqa: F401  (which looks through what the collector knows, when a plugin imports it at the end)

    with importing():
        from isaerft_sweep.trial import worker  # noqa: F401


@pytest.fixture
def trial(_as_a_worker: None, experiment: Callable[..., Experiment], tmp_path: Path) -> Callable[..., TrialFolder]:
    """Make the folder of a trial that is ready to run."""

    def made(*overrides: str, name: str = "trial", index: int = 0) -> TrialFolder:
        composed = experiment(*TINY, *overrides)
        orpo = composed.orpo
        run = naming.run_name(composed.model.name, orpo.learning_rate, orpo.beta, datetime(2025, 2, 28, 22, 28))
        spec = TrialSpec(
            index=index,
            name=run,
            model_name=naming.model_name(composed.model.name, run),
            run_id=f"run{index:05d}",
            sweep_id="sweep001",
            sweep_name="test",
            identity=identity(composed),
            created="2025-02-28T22:28:00",
            params={"orpo.learning_rate": orpo.learning_rate, "orpo.beta": orpo.beta},
            metric="eval/log_odds_chosen",
            goal="maximize",
            tags=naming.tags(orpo.learning_rate, orpo.beta),
            command="python -m isaerft_sweep.launch sweep=none",
            git_commit=None,
            experiment=composed,
        )
        made_folder = TrialFolder(tmp_path / name)
        made_folder.create(spec)
        made_folder.begin_attempt(1)
        return made_folder

    return made


@pytest.fixture(scope="session")
def _slurm() -> Iterator[slurm_bed.Bed]:
    """One cluster for each process that runs tests: see ``slurm_bed``."""
    if reason := slurm_bed.why_not():
        pytest.skip(reason)
    with slurm_bed.running_bed() as bed:
        yield bed


@pytest.fixture
def slurm(_slurm: slurm_bed.Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[slurm_bed.Bed]:
    """A real SLURM of four nodes without jobs, which the commands that a test starts belong to.

    Of a test that fails no controller is left, which would go on submitting jobs.
    """
    for name, value in _slurm.environment.items():
        monkeypatch.setenv(name, value)
    _slurm.clear()
    yield _slurm
    for process in processes_of(tmp_path, started_there=True):
        process.kill()
    _slurm.clear()


def processes_of(cwd: Path, started_there: bool = False) -> list[psutil.Process]:
    """Every living process whose command line names this test's folder, or which was started in it."""
    found = []
    for process in psutil.process_iter():
        try:
            of_it = any(str(cwd) in part for part in process.cmdline())
            of_it = of_it or (started_there and process.cwd() == str(cwd))
            if of_it and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """The server's application in this process."""
    from helpers.serve_client import Client

    made = Client(tmp_path / "data")
    yield made
    made.server.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the server's clock jump."""
    from isaerft_sweep.serve import server

    ahead = [0.0]
    real = time.monotonic
    monkeypatch.setattr(server.time, "monotonic", lambda: real() + ahead[0])

    def jump(seconds: float) -> None:
        ahead[0] += seconds

    return jump


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """A real ``isaerft-sweep serve`` that takes a run for dead after 25 s; nothing that a test started there is left."""
    server = Serving(tmp_path, "--crash-after", "25")
    server.start()
    yield server
    server.kill()
    for process in processes_of(tmp_path):
        process.kill()


def launch_command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "isaerft_sweep.launch", *overrides]


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command in ``tmp_path``."""

    def run(*overrides: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            launch_command(*overrides), cwd=tmp_path, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    return run


def events(sweep: Path) -> list[dict[str, Any]]:
    """The journal's entries."""
    return [json.loads(line) for line in (sweep / "journal.jsonl").read_text().splitlines()]
