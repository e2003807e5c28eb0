"""A sweep's fingerprint: a command with the same fingerprint resumes the same sweep."""

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
"""A larger file is identified by its size and modification time: hashing many gigabytes takes minutes."""
MAX_DIFFERENCES = 6
"""The number of settings that an error names."""


def sweep_fingerprint(experiment: Experiment, definition: SweepDefinition) -> str:
    """12 hex digits of everything that decides which trials run and what they compute.

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
    if definition.goals:
        content["goals"] = [[goal.name, goal.goal] for goal in definition.goals]
    if definition.constraints:  # sweeps without any keep their fingerprint
        content["constraints"] = list(map(str, definition.constraints))
    if experiment.sweep.seeds > 1:  # how many is left out, as the run_cap is
        content["seeds"] = True
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:12]


def known_fingerprints(experiment: Experiment, definition: SweepDefinition) -> list[str]:
    """The fingerprint, then those of earlier versions, which kept local paths relative to the current folder."""
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
    """The files whose content is in the fingerprint. Adding one would rename every sweep; ``result_files`` has all that
    decide a result."""
    data = experiment.data
    data_files = [data.path, data.eval_path] if data.source == "files" else []
    saes = [f"{site.sae_path}/sae_weights.safetensors" for site in experiment.adapter.sites if site.sae_path]
    return [expanded(path) for path in (*data_files, *saes) if path]


def result_files(experiment: Experiment, definition: SweepDefinition) -> dict[str, str]:
    """A digest of every file that the sweep's trials read, and the commit of every Hub repository, by name: what decides a
    result and may change under the same name."""
    digests: dict[str, str] = {}
    for variant in variants(experiment, definition):
        data, model = variant.data, variant.model
        if data.neutral_path:
            digests |= _file_digests([data.neutral_path])
        if data.source == "files":
            digests |= _file_digests(path for path in (data.path, data.eval_path) if path)
        elif data.source == "hub":
            digests |= _hub_commit(data.name, "dataset", None)
        if model.source == "hub":
            for name in (model.name, model.tokenizer):
                if name:
                    digests |= _file_digests([name]) or _hub_commit(name, "model", model.revision)
        digests |= _file_digests(site.sae_path for site in variant.adapter.sites if site.sae_path)
    return digests


def _file_digests(paths: Iterable[str]) -> dict[str, str]:
    """A digest of each file, and of each file in each folder, by name."""
    files: list[Path] = []
    for path in map(expanded, paths):
        files += sorted(path.glob("[!.]*")) if path.is_dir() else [path]
    return {str(file): digest for file in files if file.is_file() and (digest := _stamp(file))}


def _stamp(path: Path) -> str:
    """A file's digest; of a large file its size and modification time."""
    stat = path.stat()
    if stat.st_size <= HASHED_BYTES:
        return file_digest(path)
    return f"{stat.st_size} bytes, {stat.st_mtime_ns}"


def _hub_commit(name: str, kind: str, revision: str | None) -> dict[str, str]:
    """The commit of a Hub repository in the local cache; empty when it is not cached."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    try:
        return {f"{kind} {name}": (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()}
    except OSError:
        return {}


def file_digest(path: Path) -> str:
    """A hash of a file's content; empty for a missing file (which the preflight reports)."""
    try:
        stat = path.stat()
        return _digest(path, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return ""


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, time_ns: int) -> str:
    """The file's hash, cached while ``size`` (bytes) and ``time_ns`` stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: SweepFolder, now: Mapping[str, str]) -> None:
    """Raise FolderError when the trials would read other files than the folder's first trials.

    The first call of a sweep writes the digests ``now``, also in a sweep of a version that wrote none.
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
    """Names of the files that have changed, or were deleted from a folder that is still read."""
    changed = [name for name in then if name in now and now[name] != then[name]]
    deleted = [name for name in then if name not in now and _folder_is_read(name, now)]
    return ", ".join([*changed, *deleted][:MAX_DIFFERENCES])


def _folder_is_read(name: str, now: Mapping[str, str]) -> bool:
    """Whether trials still read the file's folder; otherwise its content may have moved to another path."""
    return any(Path(other).parent == Path(name).parent for other in now)


def sweep_folder(experiment: Experiment, definition: SweepDefinition) -> SweepFolder:
    """``output/name``; without a name, one made of the choices and the fingerprint."""
    output = expanded(experiment.output).absolute()
    if experiment.name is not None:
        if clean(experiment.name) != experiment.name:
            raise FolderError(
                f"name must be usable as a folder name but got '{experiment.name}'. Try name={clean(experiment.name)}."
            )
        return SweepFolder(output / experiment.name)
    parts = (experiment.sweep.name, experiment.model.short_name, experiment.data.name, experiment.adapter.kind)
    prefix = "-".join(clean(part).lower() for part in parts)
    fingerprints = known_fingerprints(experiment, definition)
    folders = [SweepFolder(output / f"{prefix}-{fingerprint[:6]}") for fingerprint in fingerprints]
    return next((folder for folder in folders if folder.journal.is_file()), folders[0])


def open_journal(
    folder: SweepFolder,
    fingerprints: Sequence[str],
    now: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Journal:
    """Open the journal of ``folder`` for the sweep with one of the ``fingerprints``.

    Args:
        folder: the sweep's.
        fingerprints: the sweep's, and those of older versions.
        now: its settings by dotted key (``settings``), for an error that names the differences.
        files: the digests of its files (``result_files``), for an error that names the changed ones.

    Raises FolderError when the folder is another sweep's.
    """
    own_files = (folder.lock, folder.controller_log)
    if folder.path.is_dir() and not folder.journal.exists() and any(p not in own_files for p in folder.path.iterdir()):
        raise FolderError(
            f"the output folder {folder.path} holds files but no sweep. Choose another name: name=NAME, or empty it."
        )
    journal = Journal(folder)
    if journal.record.fingerprint not in ("", *fingerprints):
        journal.close()
        raise FolderError(
            f"the output folder {folder.path} holds another sweep: {differences(folder, now or {}, files or {})}. Choose "
            "another name: name=NAME, or leave name out, and every sweep gets its own folder."
        )
    return journal


def differences(folder: SweepFolder, now: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """Which settings of the sweep in ``folder`` differ from ``now``, or which of its files have changed, as text."""
    try:
        config = to_dict(folder.read_config())
        then = _flat({section: config[section] for section in (*TUNABLE, "sweep")}) | _search_settings(
            yaml.safe_load(folder.definition.read_text(encoding="utf-8")) or {}
        )
    except (OSError, yaml.YAMLError, FolderError, TypeError, AttributeError):
        return "its config.yaml or sweep.yaml cannot be read, to say which settings differ"
    changes = [
        f"{key} was {_short(then.get(key))} and is now {_short(now.get(key))}"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key)
    ]
    if not changes:
        changed = _changed(read_json(folder.files) or {}, files)
        return f"with other data or SAE files ({changed or 'their content has changed since'})"
    omitted = f", and {len(changes) - MAX_DIFFERENCES} more" if len(changes) > MAX_DIFFERENCES else ""
    return ", ".join(changes[:MAX_DIFFERENCES]) + omitted


def settings(experiment: Experiment, definition: SweepDefinition) -> dict[str, Any]:
    """The settings that decide which trials run, by dotted key, for ``differences``."""
    content = {section: to_dict(getattr(experiment, section)) for section in (*TUNABLE, "sweep")}
    return _flat(content) | _search_settings(definition.raw)


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Values by dotted key, without those that may differ: the sweep file's path, the number of trials."""
    left_out = ("sweep.name", "sweep.file", "sweep.run_cap")
    flat = {f"{section}.{name}": value for section, content in sections.items() for name, value in content.items()}
    return {key: value for key, value in flat.items() if key not in left_out and key != "model.sites"}


def _search_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep file's method, metric and parameters, by name."""
    blocks = raw.get("parameters") or {}
    return {
        "method": raw.get("method"),
        "metric": raw.get("metrics", raw.get("metric")),
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
    """Write a new sweep's files and journal entry; a resumed sweep gets only the current command's settings.

    Args:
        experiment: the composed config.
        definition: the sweep file.
        folder: the sweep's.
        journal: the sweep's.
        fingerprint: the sweep's; None: computed from experiment and definition.
        new_id: returns a new sweep's id; called after the sweep file is written.
    """
    if journal.record.sweep_id:
        write_settings(experiment, definition, folder)
    else:
        write_definition(experiment, definition, folder)
        fingerprint, metric = fingerprint or sweep_fingerprint(experiment, definition), definition.metric
        journal.write("sweep", sweep_id=new_id(), question=fingerprint, metric=metric.name, goal=metric.goal)


def write_definition(experiment: Experiment, definition: SweepDefinition, folder: SweepFolder) -> None:
    """Write the sweep file, the composed config and the environment, for readers."""
    write_settings(experiment, definition, folder)
    write_json(folder.environment, describe_environment())


def write_settings(experiment: Experiment, definition: SweepDefinition, folder: SweepFolder) -> None:
    """Write the sweep file and the composed config, where their content has changed."""
    for path, content in ((folder.definition, dict(definition.raw)), (folder.config, to_dict(experiment))):
        text = yaml.safe_dump(content, sort_keys=False)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
