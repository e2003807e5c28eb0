"""``isaerft-sweep serve``: start the server, say how to reach it, warn where it is not safe."""

from __future__ import annotations

import copy
import getpass
import ipaddress
import logging
import os
import re
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from isaerft_sweep.errors import FolderError, LaunchError
from isaerft_sweep.serve.checks import checked_name
from isaerft_sweep.serve.disk import made_folder
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
        import uvicorn  # noqa: F401

        from isaerft_sweep.search.sampler import load_libraries
        from isaerft_sweep.serve.app import Application
        from isaerft_sweep.serve.server import Server
        from isaerft_sweep.serve.signing import Signer
    except ImportError as error:
        raise LaunchError(EXTRA) from error
    checked_name("entity", options.entity)
    context = certified(options)
    before = os.umask(0o077)  # what is in the folder is for the server's own user, from the moment that it is there
    try:
        if options.revoke is not None:
            return _revoke(options)
        log_to(options.data)
        with listening(options) as sockets:
            server = Server(options.data, options.entity, options.crash_after_s)
            try:
                keys, signer = KeyRing(options.data / "keys.jsonl"), Signer(options.data / "secret")
                load_libraries()  # no agent's heartbeat shall wait for it
                introduce(options, keys)
            except BaseException:
                server.close()
                raise
            return run(Application(server, keys, signer, options.max_upload_mb << 20).asgi(), sockets, context)
    except OSError as error:
        raise FolderError(f"the data folder {options.data} cannot be used: {error}. Choose another: --data PATH.") from error
    finally:
        os.umask(before)


def run(application: Any, sockets: list[socket.socket], context: ssl.SSLContext | None) -> int:
    """Answer on the sockets until a signal comes; 0."""
    import uvicorn

    from isaerft_sweep.serve.connections import Connection, allow_many, limit_handshakes

    limit_handshakes()

    config = uvicorn.Config(
        application,
        http=Connection,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,
        h11_max_incomplete_event_size=64 << 10,
        limit_concurrency=allow_many(),
    )
    config.load()
    config.ssl = context
    running = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):  # it has ended in order by then
        running.run(sockets)
    return 0 if running.started else 1


@contextmanager
def listening(options: Options) -> Iterator[list[socket.socket]]:
    """The sockets of the address. Raises LaunchError when it cannot be had."""
    found: list[socket.socket] = []
    where = f"{options.host}:{options.port}"
    try:
        if not 0 <= options.port <= 65535:  # the system would take its remainder
            raise OverflowError("a port is a number from 0 to 65535")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            found.append(socket.socket(family, kind, protocol))
            found[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                found[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            found[-1].bind(address)
    except (OSError, OverflowError) as error:
        for one in found:
            one.close()
        reason = getattr(error, "strerror", None) or error
        raise LaunchError(f"the address {where} cannot be had ({reason}). Choose another: --host, --port.") from error
    try:
        yield found
    finally:
        for one in found:
            one.close()


def certified(options: Options) -> ssl.SSLContext | None:
    """What https needs; None for plain http. Raises FolderError or LaunchError when the certificate does not do."""
    if options.certificate is None:
        if options.private_key is not None:
            raise LaunchError("--private-key needs the --certificate that it belongs to.")
        return None
    for path in (options.certificate, options.private_key):
        if path is not None and not path.is_file():
            raise FolderError(f"the certificate or key '{path}' must be a file, but there is none.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.certificate, options.private_key, _no_password)
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"--certificate {options.certificate} and its key must be PEM files that belong together, without a password: "
            f"{error}."
        ) from error
    return context


def _no_password() -> str:
    raise ValueError("the key has a password")


def log_to(folder: Path) -> None:
    """One line for what happens on stderr; the whole of it, traces too, in ``server.log`` in the folder."""
    made_folder(folder)
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    try:
        whole = RotatingFileHandler(folder / "server.log", maxBytes=10 << 20, backupCount=1, errors="backslashreplace")
    except OSError as error:
        raise FolderError(
            f"the data folder {folder} cannot be written ({error.strerror}). Choose another: --data PATH."
        ) from error
    whole.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[lines, whole], level=logging.INFO, force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class OneLine(logging.Formatter):
    """Without the trace."""

    def format(self, record: logging.LogRecord) -> str:
        said = copy.copy(record)
        said.exc_info = said.exc_text = said.stack_info = None
        words = super().format(said).replace("\n", " ")
        return f"{words} (the trace is in server.log)" if record.exc_info else words


def _revoke(options: Options) -> int:
    from isaerft_sweep.serve.server import Server

    server = Server(options.data, options.entity)  # so that no other runs with these keys
    try:
        return revoke(KeyRing(options.data / "keys.jsonl"), str(options.revoke))
    finally:
        server.close()


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
