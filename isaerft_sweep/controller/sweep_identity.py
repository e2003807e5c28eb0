"""What a sweep asks: two commands with the same question go on with the same sweep."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from isaerft_sweep.config.boundary import variants
from isaerft_sweep.controller.trial_factory import new_sweep_id
from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.atomic_files import read_json, write_json, write_text
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.naming import clean
from isaerft_sweep.provenance import describe_environment
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.spec_fields import canonical_json, to_dict
from isaerft_sweep.specs import TUNABLE, Experiment, HookPoint, expanded, identity

HASHED_BYTES = 256 * 2**20
"""A larger file is known by its size and time of change: a model of many gigabytes would take minutes to read."""
MOST_DIFFERENCES = 6
"""Settings that an error names."""


def sweep_fingerprint(experiment: Experiment, definition: SweepDefinition) -> str:
    """12 hex digits of all that decides which trials are run and what they compute.

    ``run_cap`` is left out: the same command with a larger one adds trials to the same sweep.
    """
    content = {
        "trial": identity(experiment),
        "method": definition.method,
        "metric": [definition.metric.name, definition.metric.goal],
        "parameters": {key: repr(d) for key, d in definition.parameters.items()},
        "seed": experiment.sweep.seed,
        "repeats": experiment.sweep.repeats,
        "files": [file_digest(path) for path in _data_and_saes(experiment)],
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:12]


def known_fingerprints(experiment: Experiment, definition: SweepDefinition) -> list[str]:
    """The question, then what it was called by versions that wrote local paths as they were given, from this folder."""
    return list(dict.fromkeys(sweep_fingerprint(spelled, definition) for spelled in _spellings(experiment)))


def _spellings(experiment: Experiment) -> Iterator[Experiment]:
    """``experiment``, and the same with its local paths relative to the current folder."""
    yield experiment
    data, model, adapter = experiment.data, experiment.model, experiment.adapter
    for relative, dotted in itertools.product((_relative, _dotted), repeat=2):
        yield dataclasses.replace(
            experiment,
            data=dataclasses.replace(data, path=relative(data.path), eval_path=relative(data.eval_path)),
            model=dataclasses.replace(model, name=relative(model.name) or "", tokenizer=relative(model.tokenizer)),
            adapter=dataclasses.replace(adapter, sites=tuple(_respelled(site, dotted) for site in adapter.sites)),
        )


def _relative(path: str | None) -> str | None:
    here = str(Path.cwd())
    return path.removeprefix(f"{here}/") if path else path


def _dotted(path: str | None) -> str | None:
    short = _relative(path)
    return f"./{short}" if short and short != path else path


def _respelled(site: HookPoint, spell: Callable[[str | None], str | None]) -> HookPoint:
    return dataclasses.replace(site, sae_path=spell(site.sae_path))


def _data_and_saes(experiment: Experiment) -> list[Path]:
    """The files that the question holds the content of. Which these are is part of every sweep's name: see
    ``result_files`` for all that decide a result."""
    data = experiment.data
    named = [data.path, data.eval_path] if data.source == "files" else []
    saes = [f"{site.sae_path}/sae_weights.safetensors" for site in experiment.adapter.sites if site.sae_path]
    return [expanded(path) for path in (*named, *saes) if path]


def result_files(experiment: Experiment, definition: SweepDefinition) -> dict[str, str]:
    """What decides a result and may change under its name: of every file and folder that the sweep's trials read, and of
    every repository on the Hub, what it is now."""
    found: dict[str, str] = {}
    for variant in variants(experiment, definition):
        data, model = variant.data, variant.model
        if data.source == "files":
            found |= _contents(path for path in (data.path, data.eval_path) if path)
        elif data.source == "hub":
            found |= _on_the_hub(data.name, "dataset", None)
        if model.source == "hub":
            for name in (model.name, model.tokenizer):
                if name:
                    found |= _contents([name]) or _on_the_hub(name, "model", model.revision)
        found |= _contents(site.sae_path for site in variant.adapter.sites if site.sae_path)
    return found


def _contents(paths: Iterable[str]) -> dict[str, str]:
    """A digest of each file, and of each file in a folder, by name."""
    files: list[Path] = []
    for path in map(expanded, paths):
        files += sorted(path.glob("[!.]*")) if path.is_dir() else [path]
    return {str(file): digest for file in files if file.is_file() and (digest := _stamp(file))}


def _stamp(path: Path) -> str:
    """A file's content, or where it is large its size and time of change."""
    facts = path.stat()
    if facts.st_size <= HASHED_BYTES:
        return file_digest(path)
    return f"{facts.st_size} bytes, {facts.st_mtime_ns}"


def _on_the_hub(name: str, kind: str, revision: str | None) -> dict[str, str]:
    """The commit of a repository that the cache holds; nothing when it holds none."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    try:
        return {f"{kind} {name}": (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()}
    except OSError:
        return {}


def file_digest(path: Path) -> str:
    """A hash of a file's content; empty when there is none (the preflight will say so)."""
    try:
        facts = path.stat()
        return _digest(path, facts.st_size, facts.st_mtime_ns)
    except OSError:
        return ""


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, time_ns: int) -> str:
    """Read once, however often it is asked for; ``size`` and ``time_ns`` tell when it has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: SweepFolder, now: Mapping[str, str]) -> None:
    """Raise FolderError when what the trials read is not what the folder's first trials have read.

    The first call of a sweep notes it. Sweeps of versions that noted nothing are taken as they are.
    """
    then = read_json(folder.files)
    if then is None:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.files, dict(now))
        return
    if changed := _changed(then, now):
        raise FolderError(
            f"the files that the sweep in {folder.path} was started with must be unchanged, since its trials would not be "
            f"comparable, but these have changed since: {changed}. Restore them, or start a new sweep: name=NAME."
        )


def _changed(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Names of the files that are not what they were, or are gone from a folder that is still read."""
    changed = [name for name in then if name in now and now[name] != then[name]]
    gone = [name for name in then if name not in now and _somewhere_else(name, now)]
    return ", ".join([*changed, *gone][:MOST_DIFFERENCES])


def _somewhere_else(name: str, now: Mapping[str, str]) -> bool:
    """Whether a file is missing from a folder that is still read: not one that another path of the same content names."""
    return any(Path(other).parent == Path(name).parent for other in now)


def sweep_folder(experiment: Experiment, definition: SweepDefinition) -> SweepFolder:
    """``output/name``; without a name, one made of the choices and the question."""
    output = expanded(experiment.output).absolute()
    if experiment.name is not None:
        if clean(experiment.name) != experiment.name:
            raise FolderError(
                f"name must be usable as a folder name but got '{experiment.name}'. Try name={clean(experiment.name)}."
            )
        return SweepFolder(output / experiment.name)
    parts = (experiment.sweep.name, experiment.model.short_name, experiment.data.name, experiment.adapter.kind)
    begin = "-".join(clean(part).lower() for part in parts)
    folders = [SweepFolder(output / f"{begin}-{asked[:6]}") for asked in known_fingerprints(experiment, definition)]
    return next((folder for folder in folders if folder.journal.is_file()), folders[0])


def open_journal(
    folder: SweepFolder,
    asked: Sequence[str],
    now: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Journal:
    """The journal of ``folder``, opened for a question.

    Args:
        folder: the sweep's.
        asked: the question, and what older versions have called it.
        now: the settings behind it, by dotted key (``settings``), to say which differ.
        files: what its files are now (``result_files``), to say which have changed.

    Raises FolderError when the folder is another sweep's.
    """
    ours = (folder.lock, folder.controller_log)
    if folder.path.is_dir() and not folder.journal.exists() and any(p not in ours for p in folder.path.iterdir()):
        raise FolderError(
            f"the output folder {folder.path} holds files but no sweep. Choose another name: name=NAME, or empty it."
        )
    journal = Journal(folder)
    if journal.record.fingerprint not in ("", *asked):
        journal.close()
        raise FolderError(
            f"the output folder {folder.path} holds another sweep: {differences(folder, now or {}, files or {})}. Choose "
            "another name: name=NAME, or leave name out, and every sweep gets a folder of its own."
        )
    return journal


def differences(folder: SweepFolder, now: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """In words, which settings of the sweep in ``folder`` are not those of ``now``, or which of its files have changed."""
    try:
        config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        then = _flat({section: config[section] for section in (*TUNABLE, "sweep")}) | _searched(
            yaml.safe_load(folder.definition.read_text(encoding="utf-8")) or {}
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return "its config.yaml or sweep.yaml cannot be read, to say which settings differ"
    said = [
        f"{key} was {_short(then.get(key))} and is now {_short(now.get(key))}"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key)
    ]
    if not said:
        changed = _changed(read_json(folder.files) or {}, files)
        return f"with other data or SAE files ({changed or 'their content has changed since'})"
    more = f", and {len(said) - MOST_DIFFERENCES} more" if len(said) > MOST_DIFFERENCES else ""
    return ", ".join(said[:MOST_DIFFERENCES]) + more


def settings(experiment: Experiment, definition: SweepDefinition) -> dict[str, Any]:
    """What decides which trials are run, by dotted key, for ``differences``."""
    content = {section: to_dict(getattr(experiment, section)) for section in (*TUNABLE, "sweep")}
    return _flat(content) | _searched(definition.raw)


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Dotted keys, but for what may differ: where the sweep file lies, how many trials there are."""
    left_out = ("sweep.name", "sweep.file", "sweep.run_cap")
    flat = {f"{section}.{name}": value for section, content in sections.items() for name, value in content.items()}
    return {key: value for key, value in flat.items() if key not in left_out and key != "model.sites"}


def _searched(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a sweep file asks, parameter by parameter."""
    blocks = raw.get("parameters") or {}
    return {
        "method": raw.get("method"),
        "metric": raw.get("metric"),
        **{f"parameters: {key}": block for key, block in blocks.items()},
    }


def _short(value: Any) -> str:
    text = "not set" if value is None else canonical_json(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def begin_sweep(
    experiment: Experiment,
    definition: SweepDefinition,
    folder: SweepFolder,
    journal: Journal,
    fingerprint: str | None = None,
    new_id: Callable[[], str] = new_sweep_id,
) -> None:
    """Write what the sweep is, if that has not been done yet; a sweep that resumes takes the last command's settings.

    Args:
        experiment: the composed config.
        definition: the sweep file.
        folder: the sweep's.
        journal: the sweep's.
        fingerprint: of the sweep; None: its own.
        new_id: gives a new sweep's id, after its file is written.
    """
    if journal.record.sweep_id:
        write_settings(experiment, definition, folder)
    else:
        write_definition(experiment, definition, folder)
        fingerprint, metric = fingerprint or sweep_fingerprint(experiment, definition), definition.metric
        journal.write("sweep", sweep_id=new_id(), question=fingerprint, metric=metric.name, goal=metric.goal)


def write_definition(experiment: Experiment, definition: SweepDefinition, folder: SweepFolder) -> None:
    """What was asked, for people: the sweep file, the composed config, and what it is run with."""
    write_settings(experiment, definition, folder)
    write_json(folder.environment, describe_environment())


def write_settings(experiment: Experiment, definition: SweepDefinition, folder: SweepFolder) -> None:
    """The sweep file and the composed config, where they are not there yet as they are now."""
    for path, content in ((folder.definition, dict(definition.raw)), (folder.config, to_dict(experiment))):
        text = yaml.safe_dump(content, sort_keys=False)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
