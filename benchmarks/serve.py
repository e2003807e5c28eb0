"""How fast and how large ``isaerft-sweep serve`` is, and what a trial costs beside a bare ``wandb agent``.

    python benchmarks/serve.py             # agents' heartbeats, runs' rows, memory, restart
    python benchmarks/serve.py --overhead  # wall time per trial: a script that does nothing, and a tiny trial of ours

The server is a process of its own on loopback with its real disk; agents and runs are simulated, their requests are wandb's.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.serving import Serving
from helpers.waiting import wait_for

CONFIG = """\
program: train.py
method: {method}
metric: {{name: loss, goal: minimize}}
run_cap: {cap}
early_terminate: {{type: hyperband, min_iter: 3}}
parameters:
  lr: {{distribution: log_uniform_values, min: 1.0e-6, max: 1.0}}
  beta: {{values: [0.05, 0.1, 0.15, 0.2]}}
"""
CREATE = 'mutation UpsertSweep($c: String) { upsertSweep(input: {config: $c, projectName: "p"}) { sweep { id name } } }'
AGENT = 'mutation CreateAgent($s: String!) { createAgent(input: {host: "h", projectName: "p", sweep: $s}) { agent { id } } }'
BEAT = """mutation Heartbeat($id: ID!, $r: JSONString) {
  agentHeartbeat(input: {id: $id, runState: $r}) { agent { id } commands }
}"""
BUCKET = """mutation UpsertBucket($n: String, $s: String) {
  upsertBucket(input: {name: $n, modelName: "p", sweep: $s, config: "{}"}) { bucket { id } inserted }
}"""
PIECE = 50
"""Rows in one request, as a run sends them that logs a few times a second."""


class Caller:
    """One connection, kept open."""

    def __init__(self, serving: Serving) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=60)
        self.used = time.monotonic()
        key = base64.b64encode(f"api:{serving.key}".encode()).decode()
        self.headers = {"Authorization": f"Basic {key}", "Content-Type": "application/json"}

    def post(self, path: str, content: Any) -> tuple[Any, float]:
        """The answer and how long it took, in ms."""
        body = json.dumps(content)
        if time.monotonic() - self.used > 4:  # as a client that finds its connection closed
            self.connection.close()
        self.used = time.monotonic()
        began = time.perf_counter()
        self.connection.request("POST", path, body, self.headers)
        answer = self.connection.getresponse()
        found = answer.read()
        took = (time.perf_counter() - began) * 1000
        assert answer.status == 200, found
        return json.loads(found), took

    def ask(self, query: str, **variables: Any) -> tuple[Any, float]:
        answer, took = self.post("/graphql", {"query": query, "variables": variables})
        assert "errors" not in answer, answer
        return answer["data"], took


def rows(run: int, begin: int) -> dict[str, Any]:
    """A piece of a run's history: 16 metrics a step."""
    content = []
    for step in range(begin, begin + PIECE):
        row = {f"train/metric_{i}": (run * 31 + step * i) % 997 / 997 for i in range(15)}
        content.append(
            json.dumps({"_step": step, "_timestamp": 1.0e9 + step, "_runtime": step / 3, "loss": 1 / (1 + step), **row})
        )
    summary = [content[-1]]
    files = {
        "wandb-history.jsonl": {"offset": begin, "content": content},
        "wandb-summary.json": {"offset": 0, "content": summary},
    }
    return {"files": files}


def beats(serving: Serving, sweep: str, agents: int, rounds: int, every_s: float, loaded: threading.Event) -> list[float]:
    """Heartbeats of ``agents`` agents that work, in ms; one connection and thread each."""
    found: list[float] = []

    def one(number: int) -> None:
        caller = Caller(serving)
        agent = caller.ask(AGENT, s=sweep)[0]["createAgent"]["agent"]["id"]
        time.sleep(every_s * number / agents)
        running: dict[str, bool] = {}
        for _ in range(rounds):
            answer, took = caller.ask(BEAT, id=agent, r=json.dumps(running))
            found.append(took)
            for command in json.loads(answer["agentHeartbeat"]["commands"]):
                if command["type"] in ("run", "resume"):
                    running = {command["run_id"]: True}
                    caller.ask(BUCKET, n=command["run_id"], s=sweep)
            time.sleep(every_s)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(agents)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded.set()
    return found


def fill(serving: Serving, sweep: str, runs: int, length: int, pause_s: float) -> tuple[list[float], float]:
    """Upload ``runs`` runs of ``length`` rows; each request's time in ms, and rows a second."""
    caller, found, began = Caller(serving), [], time.monotonic()
    for run in range(runs):
        name = f"filled{run}"
        caller.ask(BUCKET, n=name, s=sweep)
        for begin in range(0, length, PIECE):
            found.append(caller.post(f"/files/local/p/{name}/file_stream", rows(run, begin))[1])
            time.sleep(pause_s)
        caller.post(f"/files/local/p/{name}/file_stream", {"complete": True, "exitcode": 0})
    return found, runs * length / (time.monotonic() - began)


def cpu_s(serving: Serving) -> float:
    """Processor time that the server has used."""
    assert serving.process is not None
    used = psutil.Process(serving.process.pid).cpu_times()
    return float(used.user + used.system)


def resident_mib(serving: Serving) -> float:
    """Memory of the server."""
    assert serving.process is not None
    return float(psutil.Process(serving.process.pid).memory_info().rss / 2**20)


def line(name: str, times: list[float]) -> str:
    """A row of the table."""
    cuts = quantiles(times, n=100, method="inclusive")
    return f"| {name} | {len(times):,} | {median(times):.1f} | {cuts[94]:.1f} | {cuts[98]:.1f} | {max(times):.1f} |"


def measure(agents: int, runs: int, length: int) -> None:
    """Print the table of requests, then memory and restart."""
    with tempfile.TemporaryDirectory() as folder:
        serving = Serving(Path(folder))
        serving.start()
        caller = Caller(serving)
        sweep = caller.ask(CREATE, c=CONFIG.format(method="bayes", cap=100_000))[0]["upsertSweep"]["sweep"]["name"]
        idle = resident_mib(serving)
        print("| request | number | median ms | 95 % | 99 % | most |\n| --- | --- | --- | --- | --- | --- |")
        pieces, speed = fill(serving, sweep, runs, length, 0.0)
        print(line(f"{PIECE} rows of 19 values, one writer", pieces), flush=True)
        used = cpu_s(serving)
        times = beats(serving, sweep, agents, 12, 5.0, threading.Event())
        print(line(f"heartbeat, {agents} agents every 5 s", times), flush=True)
        print(line(f"  of these, idle agents' first ({agents} points handed out)", sorted(times)[-agents:]))
        share = (cpu_s(serving) - used) / 60
        done = threading.Event()
        busy: list[float] = []
        writer = threading.Thread(target=lambda: busy.extend(write_until(serving, done)))
        writer.start()
        times = beats(serving, sweep, agents, 6, 5.0, done)
        writer.join()
        print(line(f"heartbeat, while {agents} runs send {PIECE} rows every 15 s", times))
        print(line("  their rows", busy), flush=True)
        peak = resident_mib(serving)
        serving.kill()
        began = time.monotonic()
        serving.start()
        again = time.monotonic() - began
        print(
            f"\n{speed:,.0f} rows a second from one writer. Memory {idle:.0f} MiB idle, {peak:.0f} MiB with {runs:,} runs of"
        )
        print(
            f"{length:,} rows, {resident_mib(serving):.0f} MiB after kill -9 and a restart of {again:.1f} s. The server used"
        )
        print(f"{share:.0%} of a core for {agents} agents.")
        serving.kill()


def write_until(serving: Serving, done: threading.Event) -> list[float]:
    """Rows of 50 runs that log all the time."""
    caller, found, step = Caller(serving), [], 0
    for run in range(50):
        caller.ask(BUCKET, n=f"live{run}", s=None)
    while not done.is_set():
        for run in range(50):
            found.append(caller.post(f"/files/local/p/live{run}/file_stream", rows(run, step))[1])
            time.sleep(15 / 50)
        step += PIECE
    return found


NOTHING = "import wandb\nwandb.init(settings=wandb.Settings(silent=True)).finish()\n"
OVERHEAD = """\
program: {program}
method: random
metric: {{name: eval/log_odds_chosen, goal: maximize}}
run_cap: {cap}
parameters:
  orpo.learning_rate: {{distribution: log_uniform_values, min: 3.0e-2, max: 3.0e-1}}
  orpo.beta: {{values: [0.5, 1.0, 2.0]}}
command: [{command}]
"""
OURS = (
    "model=tiny",
    "data.train_size=24",
    "data.eval_size=8",
    "orpo.max_steps=2",
    "orpo.max_length=300",
    "launcher.poll_s=0.2",
)


def overhead(cap: int) -> None:
    """Print the wall time from one trial's hand-out to the next one's, by what the agent starts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "nothing.py").write_text(NOTHING)
        serving = Serving(folder)
        serving.start()
        plain = '"${env}", "${interpreter}", "${program}"'
        ours = ", ".join(("sweep=none", "sweep.file=SELF", *OURS))
        launch = f'"${{env}}", "${{interpreter}}", -m, isaerft_sweep.launch, {ours}, "${{args_no_hyphens}}"'
        print("| the agent starts | trials | median s between hand-outs |\n| --- | --- | --- |")
        for words, program, command in (
            ("a script that does nothing but wandb.init and finish", "nothing.py", plain),
            ("our launch, a tiny trial of two steps", "isaerft_sweep/launch.py", launch),
        ):
            file = folder / f"{Path(program).stem}.yaml"
            file.write_text(OVERHEAD.format(program=program, cap=cap, command=command.replace("SELF", str(file))))
            path = serving.sweep(file)
            agent = serving.agent(path, Path(program).stem)
            wait_for(lambda agent=agent: agent.poll() is not None, timeout_s=900)  # type: ignore[misc]
            handed = [e["time"] for e in serving.journal(path) if e["event"] in ("dispatch", "end")]
            gaps = [b - a for a, b in zip(handed[::2], handed[1::2], strict=False)]
            print(f"| {words} | {len(gaps)} | {median(gaps[1:]):.1f} |", flush=True)
        serving.kill()


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=50)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--trials", type=int, default=4)
    args = parser.parse_args()
    if args.overhead:
        overhead(args.trials)
    else:
        measure(args.agents, args.runs, args.rows)


if __name__ == "__main__":
    main()
