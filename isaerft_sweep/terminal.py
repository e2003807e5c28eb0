"""Output that works everywhere: on a terminal without Unicode, on one that cannot move its cursor, in a pipe."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN = {
    "…": "...", "–": "-", "—": "-", "‐": "-", "−": "-", "·": ".", "×": "x", "±": "+/-", "≤": "<=", "≥": ">=", "≈": "~",
    "→": "->", "←": "<-", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "•": "*", "✓": "ok", "✗": "x", "λ": "lambda",
    "β": "beta", "─": "-", "━": "-", "│": "|", "‖": "||",
}  # fmt: skip


def speak_any_encoding() -> None:
    """Let standard output and error take every character: the nearest ASCII replaces one that the terminal lacks.

    Bytes of a file name that are not valid text are written as Python escapes them.
    """
    codecs.register_error("isaerft-plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="isaerft-plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_as_ascii, error.object[error.start : error.end])), error.end


def _as_ascii(character: str) -> str:
    if "\ud800" <= character <= "\udfff":
        return f"\\x{ord(character) & 0xFF:02x}"
    ascii_part = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return PLAIN.get(character) or ascii_part or "?"


def make_console() -> Console:
    """Rich's console on standard output. The terminal wraps lines; rich interprets no markup."""
    from rich.console import Console

    console = Console(soft_wrap=True, markup=False, emoji=False)
    if console.is_dumb_terminal:  # rich assumes 80 columns for these
        with suppress(OSError, ValueError):
            width, height = os.get_terminal_size(sys.stdout.fileno())
            columns = os.environ.get("COLUMNS", "")
            console.size = int(columns) if columns.isdecimal() else width or console.width, height or console.height
    return console


def is_live(console: Console) -> bool:
    """Whether printed lines can be redrawn."""
    return console.is_terminal and not console.is_dumb_terminal
