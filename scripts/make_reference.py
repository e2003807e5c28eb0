"""Write docs/reference-config.md, -commands.md and -api.md from the code; ``--check`` fails when they are out of date."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import isaerft_sweep as isw
from isaerft_sweep.cli.parser import make_parser
from isaerft_sweep.specs import Experiment

LAUNCH = """\
## python -m isaerft_sweep.launch

Runs a sweep, or resumes it: the same command, any number of times. Also as `isaerft-launch`.

| argument | meaning |
| --- | --- |
| `KEY=VALUE` | An override of the config: see the config reference. |
| `--detach` | Leave the controller running in the background. |
| `--cfg job` | Print the composed config and run nothing. |
| `--multirun`, `-m` | One sweep after the other: `-m model=tiny,gemma-2-2b name=a,b`. |
| `--config-dir FOLDER` | A folder with config files of your own, searched before the package's. |
| `--help` | Show the groups and Hydra's further flags. |

Exit codes: 0; 1 when no trial completed or one was given up; 2 after an error that you can fix; 130 after Ctrl-C.
""".splitlines()
API = """\
```python
import isaerft_sweep as isw

sweep = isw.load_sweep("outputs/demo")  # or "wandb:ENTITY/PROJECT/ID"; metric="eval/nll_loss" ranks by another
table = sweep.to_dataframe()  # a row a trial
best = sweep.best()
best.params, best.metrics, best.path  # {"orpo.beta": 5.0, …}, {"eval/log_odds_chosen": -0.009, …}, the folder
best.history()  # what it logged, step by step
model, tokenizer = best.load_model()  # a PeftModel on its base model

sweep = isw.run(["model=tiny", "sweep=demo", "name=first"])  # the overrides of `python -m isaerft_sweep.launch`
```

Importing `isaerft_sweep` loads no torch. A mistake raises an `IsaerftError` (`isaerft_sweep.errors`) whose text is one line.

An adapter is an ordinary PEFT method. After `import isaerft_sweep.adapter`:

```python
from isaerft_sweep.adapter import load_model

model, tokenizer = load_model("outputs/demo/trials/RUN/adapter")
```

`get_peft_model(model, IsaerftConfig(...))`, `PeftModel.from_pretrained`, `pipeline("text-generation", model=ADAPTER)`,
`disable_adapter`, `add_weighted_adapter` for adapters that add a constant and, where it is exact, `merge_and_unload` work as
for any other method.
""".splitlines()
DOCS = Path(__file__).parent.parent / "docs"
NOTE = "Made by `python scripts/make_reference.py`; do not edit.\n"


def config_page() -> str:
    """Every config key with its type, default, bounds and meaning, section by section."""
    lines = ["# Config reference", "", NOTE]
    lines += [
        "Every key is an override of `python -m isaerft_sweep.launch`: `orpo.beta=0.2`. A group such as `orpo=quick`",
        "chooses a file of `conf/`, which sets several; `--cfg job` prints the result. Keys of `model`, `data`, `adapter`",
        "and `orpo` may be swept. The defaults here are the code's; the files in `conf/` have their own.",
        "",
    ]
    hints = typing.get_type_hints(Experiment)
    top = [f for f in dataclasses.fields(Experiment) if not dataclasses.is_dataclass(hints[f.name])]
    lines += ["## Sweep folder", "", *table("", top, hints)]
    for f in dataclasses.fields(Experiment):
        spec = hints[f.name]
        if dataclasses.is_dataclass(spec):
            lines += [f"## {f.name}", "", str(spec.__doc__).partition("\n")[0], ""]
            lines += table(f"{f.name}.", dataclasses.fields(spec), typing.get_type_hints(spec))
    hook_point = typing.get_args(typing.get_type_hints(hints["adapter"])["sites"])[0]
    lines += ["## An entry of adapter.sites", ""]
    lines += table("", dataclasses.fields(hook_point), typing.get_type_hints(hook_point))
    return "\n".join(lines)


def table(prefix: str, fields: Any, hints: dict[str, Any]) -> list[str]:
    """A Markdown table of a spec's fields."""
    rows = ["| key | type | default | values | meaning |", "| --- | --- | --- | --- | --- |"]
    for f in fields:
        nested = hints[f.name]
        if dataclasses.is_dataclass(nested):
            rows += table(f"{prefix}{f.name}.", dataclasses.fields(nested), typing.get_type_hints(nested))[2:-1]
            continue
        meaning = f.metadata.get("help", "").replace("|", "\\|")
        cells = (f"`{prefix}{f.name}`", type_words(hints[f.name]), default_words(f), bounds_words(f.metadata), meaning)
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def type_words(hint: Any) -> str:
    """A type annotation in words."""
    if isinstance(hint, types.UnionType):
        return f"{type_words(next(a for a in typing.get_args(hint) if a is not type(None)))} or null"
    if typing.get_origin(hint) is tuple:
        return f"list of {type_words(typing.get_args(hint)[0])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(hint, "mapping" if typing.get_origin(hint) else "hook point")


def default_words(f: Any) -> str:
    """A default as YAML writes it."""
    if f.default is not dataclasses.MISSING:
        value = list(f.default) if isinstance(f.default, tuple) else f.default
        return f"`{value if isinstance(value, str) else json.dumps(value)}`"
    return "`{}`" if f.default_factory is not dataclasses.MISSING else "must be set"


def bounds_words(meta: Any) -> str:
    """The valid values."""
    if meta.get("choices"):
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    bounds = (("above", "> "), ("at_least", "≥ "), ("at_most", "≤ "))
    return ", ".join(f"{sign}{meta[name]:g}" for name, sign in bounds if meta.get(name) is not None)


def commands_page() -> str:
    """Every command of ``isaerft-sweep`` with its arguments."""
    lines = ["# Command reference", "", NOTE, *LAUNCH, ""]
    parser = make_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help for choice in commands._choices_actions}
    for name, command in commands.choices.items():
        lines += [f"## isaerft-sweep {name}", "", f"{sentence(summaries.get(name) or '')}", ""]
        rows = list(arguments(command))
        if rows:
            lines += ["| argument | default | meaning |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def api_page() -> str:
    """The Python API: functions, then classes with what they have, from signatures and docstrings."""
    lines = ["# Python API", "", NOTE, *API, ""]
    for name in ("load_sweep", "run"):
        lines += [f"## isw.{name}", "", *described(getattr(isw, name), f"isw.{name}")]
    for kind in (isw.Sweep, isw.Trial):
        lines += [f"## {kind.__name__}", "", str(kind.__doc__).partition("\n")[0], ""]
        for name, member in vars(kind).items():
            if name.startswith("_"):
                continue
            if isinstance(member, property):
                doc = " ".join(inspect.getdoc(member).split())
                lines += [f"**`.{name}`** {doc}", ""]
            elif inspect.isfunction(member):
                lines += described(member, f".{name}")
    return re.sub(r"(?<!`)``(?!`)", "`", "\n".join(lines))


def described(function: Any, name: str) -> list[str]:
    """Signature and docstring of a function."""
    shown = [str(p).replace("'", "") for p in inspect.signature(function).parameters.values() if p.name != "self"]
    paragraphs = inspect.getdoc(function).split("\n\n")
    lines = [f"**`{name}({', '.join(shown)})`**", ""]
    for paragraph in paragraphs:
        if paragraph.startswith("Args:"):
            rows = [line.strip().partition(": ") for line in paragraph.splitlines()[1:]]
            lines += [*(f"- `{argument}`: {text}" for argument, _, text in rows), ""]
        else:
            lines += [" ".join(paragraph.split()), ""]
    return lines


def sentence(text: str) -> str:
    """``text`` as a sentence."""
    return f"{text[:1].upper()}{text[1:]}{'' if text[-1] in '.?!' else '.'}" if text else ""


def arguments(command: argparse.ArgumentParser) -> Iterator[str]:
    """A table row for each argument of a command."""
    for action in command._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        words = (
            ", ".join(f"`{option}`" for option in action.option_strings) or f"`{(action.metavar or action.dest).upper()}`"
        )
        if action.choices:
            words += " (" + ", ".join(map(str, action.choices)) + ")"
        shown = action.default not in (None, False, [], argparse.SUPPRESS) and action.option_strings
        default = f"`{action.default}`" if shown else ""
        yield f"| {words} | {default} | {sentence((action.help or '').replace('|', chr(92) + '|'))} |"


def main() -> int:
    """Write the pages, or compare them."""
    check, stale = "--check" in sys.argv[1:], []
    pages = {"reference-config.md": config_page(), "reference-commands.md": commands_page(), "reference-api.md": api_page()}
    for name, text in pages.items():
        path = DOCS / name
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            stale.append(path.name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(
            f"{', '.join(stale)} must be what the code says, but is out of date: python scripts/make_reference.py",
            file=sys.stderr,
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
