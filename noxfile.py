"""The server against several versions of wandb: ``nox`` for all, ``nox -s "wandb(0.19.11)"`` for one.

Each version gets an environment of its own with nothing else in it; the server runs in the interpreter that runs nox.
"""

import sys

import nox

VERSIONS = ("0.19.11", "0.22.3", "0.26.1", "0.31.0")
"""The oldest that is supported, two between, the newest."""

nox.options.default_venv_backend = "venv"


@nox.session(name="wandb")
@nox.parametrize("version", VERSIONS, ids=VERSIONS)
def wandb(session: nox.Session, version: str) -> None:
    """Sweep, agent, preemption, pause, resume, cancel, offline runs, a trial's own tracker."""
    session.install(f"wandb=={version}")
    session.run(sys.executable, "tests/compatibility.py", session.bin, external=True)
