"""Starts the real server and the real ``wandb`` command for tests, all on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.waiting import wait_for

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Serving:
    """``isaerft-sweep serve`` as a process of its own, which can be killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_port()
        self.out = folder / "serve.out"
        self.key = ""
        self.process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"{'https' if '--certificate' in self.options else 'http'}://127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        return self.folder / "isaerft-serve"

    def start(self) -> None:
        command = [str(BIN / "isaerft-sweep"), "serve", "--port", str(self.port), *self.options]
        with self.out.open("a") as out:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=out, stderr=subprocess.STDOUT, text=True, env=environment
            )
        wait_for(self._answers, timeout_s=60)
        self.key = self.key or re.findall(r"WANDB_API_KEY=(\S+)", self.out.read_text())[-1]

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.out.read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        except OSError:
            return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)

    @property
    def environment(self) -> dict[str, str]:
        """What a user's shell has: the two lines that the server printed."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        kept |= {"PATH": f"{BIN}:{os.environ['PATH']}", "WANDB_BASE_URL": self.address, "WANDB_API_KEY": self.key}
        return {**kept, "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, cwd: Path | None = None, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def sweep(self, file: Path, project: str = "demo") -> str:
        """``wandb sweep``; the path that it prints for ``wandb agent``."""
        done = self.run("wandb", "sweep", "-p", project, str(file))
        found = re.search(r"wandb agent (\S+)", done.stdout + done.stderr)
        assert found, done.stdout + done.stderr
        return found[1]

    def agent(self, path: str, name: str, *options: str) -> subprocess.Popen[str]:
        with (self.folder / f"{name}.out").open("a") as out:
            return subprocess.Popen(
                ["wandb", "agent", *options, path],
                cwd=self.folder,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def journal(self, path: str) -> list[dict[str, Any]]:
        """The sweep's entries on the server."""
        lines = (self.data / "sweeps" / path.rpartition("/")[2] / "journal.jsonl").read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]
