"""``isaerft-sweep serve``: starts the server, prints how to reach it, and warns when connections are not encrypted."""

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
from isaerft_sweep.serve.disk import prepare_folder
from isaerft_sweep.serve.keys import KeyRing

EXTRA = "isaerft-sweep serve needs the extra `serve`: pip install 'isaerft-sweep[serve]'."


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

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
    """Run the server until a signal stops it. Raises LaunchError or FolderError when it cannot start."""
    try:
        import uvicorn  # noqa: F401

        from isaerft_sweep.search.sampler import load_libraries
        from isaerft_sweep.serve.app import Application
        from isaerft_sweep.serve.server import Server
        from isaerft_sweep.serve.signing import Signer
    except ImportError as error:
        raise LaunchError(EXTRA) from error
    checked_name("entity", options.entity)
    context = tls_context(options)
    old_umask = os.umask(0o077)  # new files in the folder must never be readable by other users
    try:
        if options.revoke is not None:
            return _revoke(options)
        log_to(options.data)
        with listening(options) as sockets:
            server = Server(options.data, options.entity, options.crash_after_s)
            try:
                keys, signer = KeyRing(options.data / "keys.jsonl"), Signer(options.data / "secret")
                load_libraries()  # now, so that no agent's heartbeat has to wait for it
                introduce(options, keys)
            except BaseException:
                server.close()
                raise
            return run(Application(server, keys, signer, options.max_upload_mb << 20).asgi(), sockets, context)
    except OSError as error:
        raise FolderError(f"the data folder {options.data} cannot be used: {error}. Choose another: --data PATH.") from error
    finally:
        os.umask(old_umask)


def run(application: Any, sockets: list[socket.socket], context: ssl.SSLContext | None) -> int:
    """Answer requests on the sockets until a signal arrives; returns the exit code."""
    import uvicorn

    from isaerft_sweep.serve.connections import Connection, limit_handshakes, raise_file_limit

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
        limit_concurrency=raise_file_limit(),
    )
    config.load()
    config.ssl = context
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):  # raised after the server has shut down
        server.run(sockets)
    return 0 if server.started else 1


@contextmanager
def listening(options: Options) -> Iterator[list[socket.socket]]:
    """Sockets that listen on the address. Raises LaunchError when that is not possible."""
    sockets: list[socket.socket] = []
    address_text = f"{options.host}:{options.port}"
    try:
        if not 0 <= options.port <= 65535:  # the system would use its remainder
            raise OverflowError("a port is a number from 0 to 65535")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            sockets.append(socket.socket(family, kind, protocol))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind(address)
    except (OSError, OverflowError) as error:
        for opened in sockets:
            opened.close()
        reason = getattr(error, "strerror", None) or error
        raise LaunchError(f"cannot listen on {address_text} ({reason}). Choose another: --host, --port.") from error
    try:
        yield sockets
    finally:
        for opened in sockets:
            opened.close()


def tls_context(options: Options) -> ssl.SSLContext | None:
    """The TLS settings; None for plain http. Raises FolderError or LaunchError when the certificate is not usable."""
    if options.certificate is None:
        if options.private_key is not None:
            raise LaunchError("--private-key needs the --certificate that it belongs to.")
        return None
    for path in (options.certificate, options.private_key):
        if path is not None and not path.is_file():
            raise FolderError(f"the certificate or key '{path}' must be a file, but it does not exist.")
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
    """Log to stderr in single lines, and to ``server.log`` in the folder with tracebacks. Raises FolderError."""
    prepare_folder(folder)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    try:
        file = RotatingFileHandler(folder / "server.log", maxBytes=10 << 20, backupCount=1, errors="backslashreplace")
    except OSError as error:
        raise FolderError(
            f"the data folder {folder} cannot be written ({error.strerror}). Choose another: --data PATH."
        ) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[console, file], level=logging.INFO, force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class OneLine(logging.Formatter):
    """Formats a record as one line, without the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        stripped = copy.copy(record)
        stripped.exc_info = stripped.exc_text = stripped.stack_info = None
        line = super().format(stripped).replace("\n", " ")
        return f"{line} (the traceback is in server.log)" if record.exc_info else line


def _revoke(options: Options) -> int:
    from isaerft_sweep.serve.server import Server

    server = Server(options.data, options.entity)  # locks the folder: a running server would still accept the keys
    try:
        return revoke(KeyRing(options.data / "keys.jsonl"), str(options.revoke))
    finally:
        server.close()


def introduce(options: Options, keys: KeyRing) -> None:
    """Print how to reach the server. The first start, and ``--new-key``, create a key, which is shown only now."""
    scheme = "https" if options.certificate else "http"
    # other machines must be able to use the printed address
    host = socket.getfqdn() if options.host in ("0.0.0.0", "::") else options.host
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.port}"
    print(f"serving {options.data} at {address} (also for a browser: any name, the key as password)")
    user = re.sub(r"[^A-Za-z0-9_.-]", "-", getpass.getuser()) or "user"
    lines = [f"export WANDB_BASE_URL={address}"]
    if options.new_key or not keys.users:
        lines.append(f"export WANDB_API_KEY={keys.add(user)}")
        print("In the shells of `wandb sweep` and `wandb agent` (the key is shown only now; --new-key creates another):\n")
    else:
        print("In the shells of `wandb sweep` and `wandb agent`, with your key (lost? --new-key creates another):\n")
    print("\n".join(f"    {line}" for line in lines), end="\n\n", flush=True)
    if not options.certificate and not is_loopback(options.host):
        print(
            "warning: keys and results cross the network unencrypted: give --certificate and --private-key, or keep the "
            "server on 127.0.0.1 and reach it through ssh -L.",
            file=sys.stderr,
            flush=True,
        )


def revoke(keys: KeyRing, user: str) -> int:
    """Make a user's keys invalid; returns 0. Raises LaunchError when the user has none."""
    if user not in keys.users:
        raise LaunchError(
            f"--revoke must name a user who has a key but got '{user}'. Valid: {', '.join(sorted(keys.users))}."
        )
    keys.revoke(user)
    print(f"All keys of {user} are revoked. --new-key creates another, and so does the next start when no key is left.")
    return 0


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
