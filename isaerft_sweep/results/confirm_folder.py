"""The folder of the sweep that reruns another sweep's leaders with new seeds."""

from __future__ import annotations

import hashlib

from isaerft_sweep.journal.journal import read_record
from isaerft_sweep.journal.layout import SweepFolder

SUFFIX = "-confirm"


def confirm_folder(sweep: SweepFolder) -> SweepFolder:
    """The folder of the sweep that reruns the leaders of ``sweep``."""
    return SweepFolder(sweep.path.with_name(f"{sweep.path.name}{SUFFIX}"))


def first_sweep(again: SweepFolder) -> SweepFolder | None:
    """The sweep whose leaders ``again`` reruns; None when ``again`` is no confirmation."""
    first = SweepFolder(again.path.with_name(again.path.name.removesuffix(SUFFIX)))
    if first.path == again.path or not first.journal.is_file():
        return None
    original, rerun = read_record(first), read_record(again)
    return first if rerun.fingerprint == confirmation_fingerprint(original.fingerprint) else None


def confirmation_fingerprint(fingerprint: str) -> str:
    """The fingerprint of the confirmation of the sweep with ``fingerprint``."""
    return hashlib.sha256(f"confirm {fingerprint}".encode()).hexdigest()[:12]
