"""Checks that a folder holds a complete SAE as sae_lens saves it, without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from isaerft_sweep.errors import ModelError
from isaerft_sweep.preferences import LFS_POINTER, expanded

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def check_sae_folder(path: str) -> Path:
    """The folder ``path``, with ``~`` expanded. Raises ModelError unless it holds a config and complete weights."""
    folder = expanded(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(
                f"sae_path must be a folder with {CONFIG} and {WEIGHTS} (as sae_lens saves it) but got '{path}', where "
                f"there is no {name}."
            )
        if _is_pointer(folder / name):
            raise ModelError(f"{folder / name} is a pointer of Git LFS: fetch the file itself with `git lfs pull`.")
    _read_config(folder / CONFIG)
    _check_weights(folder / WEIGHTS)
    return folder


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER.encode()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} must be JSON but cannot be read ({error}). Copy the SAE's folder again.") from error
    if isinstance(config, dict) and not isinstance(config.get("metadata", {}), dict):
        raise ModelError(f"{path}: metadata must be an object but is {json.dumps(config['metadata'])[:80]}.")
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold an SAE's config, an object, but holds {str(config)[:80]!r}.")
    for name in ("d_in", "d_sae"):
        if not isinstance(config.get(name), int) or isinstance(config[name], bool) or config[name] < 1:
            raise ModelError(f"{path} must say {name}, a whole number above 0, but says {config.get(name)!r}.")
    return config


def _check_weights(path: Path) -> None:
    """Check the size of a safetensors file: 8 bytes of header length, a JSON header with tensor offsets, the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is cut short")
            header = json.loads(file.read(length))
        needed = 8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        if size < needed:
            raise ValueError(f"it has {size} of {needed} bytes")
    except (OSError, struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} must be a whole file of safetensors but is not ({error}). Copy the SAE's folder again."
        ) from error
