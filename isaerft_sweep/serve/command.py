"""``isaerft-sweep serve``: start the server, say how to reach it, warn where it is not safe."""

from __future__ import annotations

import getpass
import ipaddress
import logging
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from isaerft_sweep.errors import FolderError, LaunchError
from isaerft_sweep.serve.keys import KeyRing

EXTRA = "isaerft-sweep serve needs the extra `serve`: pip install 'isaerft-sweep[serve]'."


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data: Path
    host: str = "127.0.0.1"
    port: int = 8090
    entity: str = "local"
    certificate: Path | None = None
    private_key: Path | None = None
    new_key: bool = False
    revoke: str | None = None
    crash_after_s: float = 90.0
    max_upload_mb: int = 1024


def serve(options: Options) -> int:
    """Run the server until it is told to end. Raises LaunchError or FolderError before it begins."""
    try:
        import uvicorn

        from isaerft_sweep.search.sampler import load_libraries
        from isaerft_sweep.serve.app import Application
        from isaerft_sweep.serve.server import Server
        from isaerft_sweep.serve.signing import Signer
    except ImportError as error:
        raise LaunchError(EXTRA) from error
    for path in (options.certificate, options.private_key):
        if path is not None and not path.is_file():
            raise FolderError(f"the certificate or key '{path}' must be a file, but there is none.")
    if options.revoke is None:
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
        )
    server = Server(options.data, options.entity, options.crash_after_s)
    keys = KeyRing(options.data / "keys.jsonl")
    if options.revoke is not None:  # only now: no server runs with these keys
        server.close()
        return revoke(keys, options.revoke)
    load_libraries()  # no agent's heartbeat shall wait for it
    introduce(options, keys)
    application = Application(server, keys, Signer(options.data / "secret"), options.max_upload_mb << 20)
    config = uvicorn.Config(
        application.asgi(),
        host=options.host,
        port=options.port,
        ssl_certfile=str(options.certificate) if options.certificate else None,
        ssl_keyfile=str(options.private_key) if options.private_key else None,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,
        h11_max_incomplete_event_size=64 << 10,
        limit_concurrency=2000,
    )
    running = uvicorn.Server(config)
    running.run()
    return 0 if running.started else 1


def introduce(options: Options, keys: KeyRing) -> None:
    """Print how to reach the server; a key is made for the first start, or when one is asked for, and shown this once."""
    scheme = "https" if options.certificate else "http"
    # other machines must be able to use what is printed
    host = socket.getfqdn() if options.host in ("0.0.0.0", "::") else options.host
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.port}"
    print(f"serving {options.data} at {address} (also for a browser: any name, the key as password)")
    user = re.sub(r"[^A-Za-z0-9_.-]", "-", getpass.getuser()) or "user"
    lines = [f"export WANDB_BASE_URL={address}"]
    if options.new_key or not keys.users:
        lines.append(f"export WANDB_API_KEY={keys.add(user)}")
        print("In the shells of `wandb sweep` and `wandb agent` (the key is shown only now; another: --new-key):\n")
    else:
        print("In the shells of `wandb sweep` and `wandb agent`, with your key (lost? --new-key makes another):\n")
    print("\n".join(f"    {line}" for line in lines), end="\n\n", flush=True)
    if not options.certificate and not is_loopback(options.host):
        print(
            "warning: keys and results cross the network unencrypted: give --certificate and --private-key, or keep the "
            "server on 127.0.0.1 and reach it through ssh -L.",
            file=sys.stderr,
            flush=True,
        )


def revoke(keys: KeyRing, user: str) -> int:
    """Make a user's keys invalid; 0. Raises LaunchError when there is none."""
    if user not in keys.users:
        raise LaunchError(
            f"--revoke must name a user who has a key but got '{user}'. Valid: {', '.join(sorted(keys.users))}."
        )
    keys.revoke(user)
    print(f"No key of {user} is valid any more. The next start makes another, or: --new-key.")
    return 0


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
