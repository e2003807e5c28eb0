"""A real SLURM of several nodes on this one machine, for tests and benchmarks.

    python tests/helpers/slurm_bed.py          # starts one, says how to use it, and stops it on Ctrl-C

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge, with accounting slurmdbd and MariaDB's server too.
Everything (munge, database, controller, node daemons with fake GPUs) runs in a folder and on ports of its own, so that
several beds can be up at once: each pytest worker has one, and a test that kills daemons disturbs no other. A guardian
process stops all of it when the process that started the bed ends, in whatever way.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

if __package__ in (None, ""):  # started as a program
    sys.path.insert(0, str(Path(__file__).parent.parent))
from helpers.waiting import wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb", "sacctmgr")
PACKAGES = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core"
CPUS, MEMORY_MB, GPUS = 4, 8000, 2
"""Of each node, as SLURM believes."""
STARTING_S = 60.0


def why_not() -> str | None:
    """Why no bed can be started here; None when one can."""
    if os.geteuid() != 0:
        return "a SLURM test bed needs root (mknod for the fake GPUs, daemons that start jobs)"
    missing = [name for name in (*PROGRAMS, *ACCOUNTING_PROGRAMS) if which(name) is None]
    return f"a SLURM test bed needs {', '.join(missing)}: apt-get install {PACKAGES}" if missing else None


def which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@dataclass
class Bed:
    """One cluster. ``options`` are lines of slurm.conf that come in place of those with the same key."""

    accounting: bool = True
    nodes: int = 4
    options: dict[str, str] = field(default_factory=dict)
    root: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="isaerft-slurm-")))
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    path: str = field(default_factory=lambda: os.environ["PATH"])
    """A test may change PATH; the bed keeps the one that it began with."""

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this cluster and no other."""
        return {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Return when all nodes wait for jobs."""
        self.root.chmod(0o755)
        self._guard()
        for name in ("log", "state", "spool", "dev", "bin"):
            (self.root / name).mkdir(exist_ok=True)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for number in range(GPUS):  # SLURM takes nothing but character devices; these are /dev/null's twins
            os.mknod(self.root / "dev" / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        ports = free_ports(self.nodes + 2)
        self._write_conf(ports)
        munge = self.root / "munge.socket"
        flags = [
            f"--{k}={self.root / f'munge.{v}'}" for k, v in (("key-file", "key"), ("pid-file", "pid"), ("seed-file", "seed"))
        ]
        self.spawn("munged", "--foreground", f"--socket={munge}", f"--log-file={self.root / 'log/munged'}", *flags)
        wait_for(munge.exists, "munged's socket")
        if self.accounting:
            self._start_accounting()
        self.start_controller()
        for number in range(1, self.nodes + 1):
            self.start_node(number)
        wait_for(self.idle, "idle nodes", lambda: self.command("sinfo", "-R", "-o", "%N %T %E"))

    def start_controller(self) -> None:
        self.spawn("slurmctld", "-D", *([] if any((self.root / "state").iterdir()) else ["-i"]))
        wait_for(
            lambda: subprocess.run(["scontrol", "ping"], env=self._env(), capture_output=True).returncode == 0, "slurmctld"
        )

    def start_node(self, number: int) -> None:
        (self.root / "spool" / f"n{number}").mkdir(exist_ok=True)
        self.spawn("slurmd", "-D", "-N", f"n{number}", key=f"n{number}")

    def idle(self) -> bool:
        return self.command("sinfo", "-h", "-o", "%T %D", "-p", "main").strip() == f"idle {self.nodes}"

    def kill(self, key: str) -> None:
        """kill -9 a daemon (``slurmctld``, ``slurmdbd`` or a node, ``n2``). What a node was running lives on as orphans."""
        self.daemons[key].kill()
        self.daemons.pop(key).wait()

    def reconfigure(self, key: str, value: str) -> None:
        """Change a setting while the cluster runs."""
        lines = [f"{key}={value}" if line.startswith(f"{key}=") else line for line in self.conf.read_text().splitlines()]
        self.conf.write_text("\n".join(lines) + "\n")
        self.command("scontrol", "reconfigure")

    def command(self, *command: str) -> str:
        """What a command of this cluster prints."""
        return subprocess.run(command, env=self._env(), capture_output=True, text=True, check=True, timeout=60).stdout

    def jobs(self) -> list[str]:
        """Ids of all that is queued or running."""
        return self.command("squeue", "-h", "-r", "-o", "%i").split()

    def clear(self) -> None:
        """No job is left, every daemon runs and every node is ready: what a test finds when it begins."""
        if "slurmctld" not in self.daemons:
            self.start_controller()
        for number in range(1, self.nodes + 1):
            if f"n{number}" not in self.daemons:
                self.start_node(number)
        if jobs := self.jobs():
            for how in (["--full", "--signal=KILL"], []):  # one that ends meanwhile makes scancel fail
                subprocess.run(["scancel", *how, *jobs], env=self._env(), capture_output=True, timeout=60)
        wait_for(lambda: not self.jobs() and self.idle(), "an empty cluster", lambda: self.command("squeue"))
        kill_jobs_of(self.conf)

    def stop(self) -> None:
        """End all of it."""
        for name in sorted(self.daemons, key=list(self.daemons).index, reverse=True):
            daemon = self.daemons[name]
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        kill_jobs_of(self.conf)
        shutil.rmtree(self.root, ignore_errors=True)
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        self._guardian.wait()

    def spawn(self, program: str, *args: str, key: str = "", **extra: str) -> None:
        path = which(program)
        assert path is not None, program
        with (self.root / "log" / f"{key or program}.out").open("ab") as log:
            self.daemons[key or program] = subprocess.Popen(
                [path, *args], env=self._env(extra), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        with (self.root / "pids").open("a") as file:
            file.write(f"{self.daemons[key or program].pid}\n")

    def _env(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, "PATH": self.path, **self.environment, **(extra or {})}

    def _guard(self) -> None:
        """A process that notices by a closed pipe that this one has ended, and stops what is left."""
        self._guardian = subprocess.Popen(
            [sys.executable, __file__, "--guard", str(self.root)], stdin=subprocess.PIPE, start_new_session=True
        )

    def _start_accounting(self) -> None:
        data, sock, port = self.root / "db", self.root / "db.sock", self._dbd_port
        install = [
            "mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db",
            "--auth-root-authentication-method=socket",
        ]  # fmt: skip
        subprocess.run(install, check=True, capture_output=True)
        self.spawn(
            "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={sock}", "--skip-networking",
            f"--pid-file={self.root / 'db.pid'}", "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        ping = ["mariadb", "--no-defaults", "-S", str(sock), "-e", "select 1"]
        wait_for(lambda: subprocess.run(ping, capture_output=True).returncode == 0, "mariadbd")
        conf = self.root / "slurmdbd.conf"
        conf.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={self.root}/munge.socket\nDbdHost=localhost\nDbdAddr=127.0.0.1\n"
            f"DbdPort={port}\nSlurmUser=root\nPidFile={self.root}/slurmdbd.pid\nLogFile={self.root}/log/slurmdbd\n"
            "StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser=root\nStorageLoc=slurm_acct_db\n"
            "CommitDelay=0\n"
        )
        conf.chmod(0o600)
        self.spawn("slurmdbd", "-D", MYSQL_UNIX_PORT=str(sock))
        listed = ["sacctmgr", "-n", "list", "cluster"]
        wait_for(lambda: subprocess.run(listed, env=self._env(), capture_output=True).returncode == 0, "slurmdbd")
        for words in (
            "add cluster bed",
            "add qos few MaxSubmitJobsPerUser=3",
            "add account lab",
            "add user root account=lab defaultaccount=lab",
            "modify user root set qos+=few",
        ):
            self.command("sacctmgr", "-i", *words.split())

    def _write_conf(self, ports: list[int]) -> None:
        root, host = self.root, socket.gethostname().split(".")[0]
        self._dbd_port = ports[1]
        settings = {
            "ClusterName": "bed", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": str(ports[0]),
            "SlurmUser": "root", "SlurmdUser": "root", "AuthType": "auth/munge", "CredType": "cred/munge",
            # a job that is queued again may start once its old credential has expired: 5 s here, else 2 min
            "AuthInfo": f"socket={root}/munge.socket,cred_expire=5",
            "StateSaveLocation": f"{root}/state", "SlurmdSpoolDir": f"{root}/spool/%n",
            "SlurmctldPidFile": f"{root}/slurmctld.pid", "SlurmdPidFile": f"{root}/slurmd.%n.pid",
            "SlurmctldLogFile": f"{root}/log/slurmctld", "SlurmdLogFile": f"{root}/log/slurmd.%n",
            "MailProg": "/bin/true", "MpiDefault": "none", "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none", "JobAcctGatherType": "jobacct_gather/none", "SwitchType": "switch/none",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core_Memory",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0",
            "DefMemPerCPU": "100", "GresTypes": "gpu", "SlurmdParameters": "config_overrides", "ReturnToService": "2",
            "SlurmctldTimeout": "10", "SlurmdTimeout": "10", "KillWait": "5", "MinJobAge": "600", "CompleteWait": "0",
            "PropagateResourceLimits": "NONE", "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "user_resv_delete", "JobCompType": "jobcomp/none", "MaxArraySize": "1001",
        }  # fmt: skip
        if self.accounting:
            settings |= {
                "AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageHost": "127.0.0.1",
                "AccountingStoragePort": str(ports[1]), "AccountingStorageTRES": "gres/gpu",
                "AccountingStoragePass": f"{root}/munge.socket", "AccountingStorageEnforce": "associations,limits,qos",
            }  # fmt: skip
        lines = [f"{key}={value}" for key, value in {**settings, **self.options}.items()]
        for number, port in enumerate(ports[2:], 1):
            feature = "big" if number == 1 else "small"
            lines.append(
                f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Boards=1 SocketsPerBoard=1 "
                f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB} Gres=gpu:fake:{GPUS} Feature={feature} State=UNKNOWN"
            )
        lines += [
            "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE State=UP",
            "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP",
            "PartitionName=hasty Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=1 MaxTime=INFINITE State=UP",
            "PartitionName=short Nodes=n1 PriorityTier=1 PreemptMode=REQUEUE MaxTime=5 State=UP",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        (root / "gres.conf").write_text(f"NodeName=n[1-{self.nodes}] Name=gpu Type=fake File={root}/dev/gpu[0-{GPUS - 1}]\n")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def kill_jobs_of(conf: Path) -> None:
    """kill -9 whatever jobs of that cluster still run, and what looks after them; a killed slurmd leaves both behind."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            in_a_job = "SLURM_JOB_ID" in environment and environment.get("SLURM_CONF") == str(conf)
            if in_a_job or (process.name() == "slurmstepd" and holds_file_below(process, conf.parent)):
                process.kill()


def holds_file_below(process: psutil.Process, root: Path) -> bool:
    """Whether the process has a file below ``root`` open, be it deleted; slurmstepd's title hides its environment."""
    return any(root in link.readlink().parents for link in Path(f"/proc/{process.pid}/fd").iterdir())


@contextlib.contextmanager
def running_bed(accounting: bool = True, **options: str) -> Iterator[Bed]:
    """A bed while the block runs."""
    bed = Bed(accounting, options=options)
    try:
        bed.start()
        yield bed
    finally:
        bed.stop()


def guard(root: Path) -> None:
    """Wait for the end of whoever started the bed in ``root``, then end what it has left."""
    sys.stdin.read()
    try:
        pids = [int(line) for line in (root / "pids").read_text().split()]
    except FileNotFoundError:  # stopped in order
        return
    for pid in reversed(pids):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if any(str(root) in value for value in process.environ().values()) or str(root) in " ".join(process.cmdline()):
                process.kill()
    end = time.monotonic() + STARTING_S
    while root.exists() and time.monotonic() < end:  # a step that was being started may write once more
        kill_jobs_of(root / "slurm.conf")
        shutil.rmtree(root, ignore_errors=True)
        time.sleep(0.2)
    kill_jobs_of(root / "slurm.conf")


def main() -> None:
    if sys.argv[1:2] == ["--guard"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        guard(Path(sys.argv[2]))
        return
    if reason := why_not():
        sys.exit(reason)
    with running_bed() as bed:
        print(bed.command("sinfo"))
        print("\n".join(f"export {name}={value}" for name, value in bed.environment.items()), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
