"""YAML without duplicate keys: PyYAML silently keeps the last of two."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from isaerft_sweep.errors import SpaceError


class _OnceLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<` gives defaults, which a key beside it may replace
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # PyYAML itself refuses it
            if key in lines:
                raise SpaceError(f"line {line}: '{key}' is given twice, first in line {lines[key]}. Leave one of them out.")
            lines[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The plain data of a YAML text. Raises SpaceError that names the line of a syntax error or duplicate key."""
    try:
        return yaml.load(text, Loader=_OnceLoader)
    except yaml.YAMLError as error:
        raise SpaceError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise SpaceError("nested too deeply: a sweep file has a few levels.") from error
    except ValueError as error:  # a date of month 13, a number of a million digits
        raise SpaceError(f"not valid YAML: {error}") from error


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file in UTF-8. Raises SpaceError that names the file."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SpaceError(f"the sweep file '{path}' cannot be read ({error.strerror}). Give one: sweep.file=PATH.") from error
    except UnicodeDecodeError as error:
        raise SpaceError(
            f"{path}: must be text in UTF-8 but byte {error.start + 1} is not. Save it as UTF-8 (iconv -f latin1 -t utf-8)."
        ) from error
    except SpaceError as error:
        raise SpaceError(f"{path}: {error}") from error
