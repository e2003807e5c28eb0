"""What is printed, on any terminal: one that knows no Unicode, one that cannot move its cursor, a pipe."""

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
    """Let standard output and error take every character: one that the terminal has not is written as near as it can be.

    Bytes in a file's name that are no text are written as Python writes them.
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
    near = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return PLAIN.get(character) or near or "?"


def make_console() -> Console:
    """Rich's console on standard output. Lines are not broken, which is the terminal's own work, and text stays as it is."""
    from rich.console import Console

    made = Console(soft_wrap=True, markup=False, emoji=False)
    if made.is_dumb_terminal:  # rich takes every one for 80 columns wide
        with suppress(OSError, ValueError):
            wide, high = os.get_terminal_size(sys.stdout.fileno())
            asked = os.environ.get("COLUMNS", "")
            made.size = int(asked) if asked.isdecimal() else wide or made.width, high or made.height
    return made


def is_live(made: Console) -> bool:
    """Whether what was printed can be replaced."""
    return made.is_terminal and not made.is_dumb_terminal
