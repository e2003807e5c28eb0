"""The commands around W&B: run your own server, and upload runs to another one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from isaerft_sweep.cli.argument_types import above_zero, at_least_one


def add_serve_commands(commands: Any) -> None:
    """Add the parsers of ``serve`` and ``sync``."""
    serve = commands.add_parser("serve", help="run your own W&B backend: wandb sweep and wandb agent without internet")
    serve.add_argument("--data", type=Path, default=Path("isaerft-serve"), help="the folder that keeps everything")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=8090, help="the port to listen on; 0: a free one")
    serve.add_argument("--entity", default="local", help="the name that projects belong to (default local)")
    serve.add_argument("--certificate", type=Path, help="a PEM file, for https")
    serve.add_argument("--private-key", type=Path, help="the certificate's key, where it is not in the same file")
    serve.add_argument("--new-key", action="store_true", help="make and print another access key")
    serve.add_argument("--revoke", metavar="USER", help="revoke a user's keys (while the server is down), then exit")
    serve.add_argument(
        "--crash-after",
        type=above_zero,
        default=90.0,
        metavar="SECONDS",
        help="a run without a heartbeat for so long has crashed",
    )
    serve.add_argument("--max-upload-mb", type=at_least_one, default=1024, help="size limit of one uploaded file")
    serve.set_defaults(run=_serve)

    sync = commands.add_parser("sync", help="upload runs to a W&B server, with their sweep and run ids")
    sync.add_argument("source", type=Path, help="a sweep's folder (offline runs), or the data folder of serve")
    sync.add_argument(
        "--to", metavar="URL", help="the server (default: WANDB_BASE_URL, else W&B's cloud); key: WANDB_API_KEY"
    )
    sync.add_argument("--sweep", help="only this sweep's runs of a data folder")
    sync.add_argument("--entity", help="the entity to upload to instead of your default one")
    sync.add_argument("--project", help="default: the runs' own")
    sync.set_defaults(run=_sync)


def _serve(args: argparse.Namespace) -> int:
    from isaerft_sweep.serve.serve_command import Options, serve

    options = Options(
        args.data,
        args.host,
        args.port,
        args.entity,
        args.certificate,
        args.private_key,
        args.new_key,
        args.revoke,
        args.crash_after,
        args.max_upload_mb,
    )
    return serve(options)


def _sync(args: argparse.Namespace) -> int:
    from isaerft_sweep.serve.run_export import is_data_folder, served_uploads
    from isaerft_sweep.tracking import upload

    target = upload.target_from(os.environ, args.to, args.entity, args.project)
    if is_data_folder(args.source):
        uploads, configs = served_uploads(args.source, args.sweep)
    else:
        uploads, configs = upload.offline_uploads(args.source)
    if not uploads:
        raise upload.nothing_to_upload(args.source)
    outcome = upload.upload(uploads, configs, target, print)
    already = f", {len(outcome.present)} there already" if outcome.present else ""
    print(f"{len(outcome.uploaded)} of {len(uploads)} runs uploaded{already}")
    return 1 if outcome.failed else 0
