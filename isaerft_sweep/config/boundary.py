"""Converts OmegaConf configs to frozen specs, and checks what spans several fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, product
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from isaerft_sweep.errors import ConfigError, SpaceError
from isaerft_sweep.metrics import GENERATION, HARM
from isaerft_sweep.search.distributions import Categorical, Conditional, Constant, Distribution, Numeric, Truncated, cases_of
from isaerft_sweep.search.sweep_file import Metric, SweepDefinition, check_grid, read_parameters, read_sweep_file
from isaerft_sweep.spec_fields import canonical_json, from_mapping, overrides
from isaerft_sweep.specs import (
    AdapterSpec,
    Experiment,
    SweepSpec,
    TrackerSpec,
    absolute,
    absolute_if_folder,
    expanded,
    key_bounds,
    swept_value,
)

CHECKED_TOGETHER = ("adapter.", "data.", "orpo.gradient_checkpointing")
"""Prefixes of the keys that ``check`` compares with each other."""
CHECKED_ALONE = ("model.", "orpo.optimizer", "orpo.max_length")
"""Prefixes of further keys that name a resource that must exist."""
PATH_KEYS = ("data.path", "data.eval_path", "data.neutral_path", "model.name", "model.tokenizer")
"""Keys whose values may be local files or folders."""
WITHOUT_SAE = ("vector", "diffmean", "loreft", "lora", "prompt")
WITH_RANK = ("linear", "mlp", "lora", "loreft")
MOST_POINTS = 10_000
MOST_VARIANTS = 100
LEAST_SHARE = 0.5
"""A distribution with less than this share inside its key's bounds is refused rather than truncated."""


def to_experiment(config: Any) -> Experiment:
    """The composed config, checked. Raises ConfigError that names the key, its value and the valid ones."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{missing[0]} must be set. Give it on the command line: {missing[0]}=VALUE.")
        plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    experiment: Experiment = from_mapping(Experiment, plain, "")  # type: ignore[arg-type]
    experiment = experiment.with_absolute_paths()
    check(experiment)
    return experiment


def check(experiment: Experiment) -> None:
    """Check what spans several fields. Raises ConfigError."""
    data, adapter = experiment.data, experiment.adapter
    if data.source == "files" and not data.path:
        raise ConfigError("data.path must name a file when data.source=files. Give it: data.path=/path/pairs.jsonl.")
    if not adapter.sites:
        raise ConfigError(
            "adapter.sites must name at least one hook point but is empty. Give one: "
            "'adapter.sites=[{layer: 20, sae_path: /path/to/sae}]'."
        )
    for i, site in enumerate(adapter.sites):
        has_sae = (bool(site.sae_release) and bool(site.sae_id)) != bool(site.sae_path)
        if adapter.kind not in WITHOUT_SAE and not has_sae:
            raise ConfigError(f"adapter.sites.{i} must have either sae_release with sae_id, or sae_path, but got {site}.")
    layers = [site.layer for site in adapter.sites]
    if len(set(layers)) != len(layers):
        raise ConfigError(f"adapter.sites must have different layers but got {layers}.")
    _check_kind(adapter)
    _check_launcher(experiment)


def _check_kind(adapter: AdapterSpec) -> None:
    """Check the settings that only some kinds have. Raises ConfigError."""
    if adapter.rank is not None and adapter.kind not in WITH_RANK:
        raise ConfigError(f"adapter.rank must go with adapter.kind {', '.join(WITH_RANK)} but got kind={adapter.kind}.")
    if adapter.strength != 1 and adapter.kind != "diffmean":
        raise ConfigError(f"adapter.strength must go with adapter.kind diffmean but got kind={adapter.kind}.")
    if bool((adapter.system_prompt or "").strip()) != (adapter.kind == "prompt"):
        raise ConfigError(
            "adapter.system_prompt must be a text with adapter.kind prompt, and null with the other kinds, but got "
            f"{adapter.system_prompt!r} with kind={adapter.kind}. Right: "
            "adapter=prompt adapter.system_prompt='Answer politely.'"
        )
    if (adapter.l1 is not None or adapter.top_k is not None) and adapter.kind not in ("bias", "scale"):
        raise ConfigError(
            "adapter.l1 and adapter.top_k must go with adapter.kind bias or scale, which have one number per latent, but "
            f"got kind={adapter.kind}."
        )
    if adapter.l1 is not None and adapter.top_k is not None:
        raise ConfigError("adapter.l1 and adapter.top_k must not be set together. Leave one of them null.")


def _check_launcher(experiment: Experiment) -> None:
    launcher = experiment.launcher
    if launcher.trials_per_job is not None and not launcher.resident:
        raise ConfigError(
            "launcher.trials_per_job must go with launcher.resident=true: without resident workers a job is one trial. "
            "Leave one of them out."
        )
    excludes = {
        "launcher.resident=false": not launcher.resident,
        "launcher.lean_logits=false": not launcher.lean_logits,
        "launcher.compile=true": launcher.compile,
        "orpo.gradient_checkpointing=true": experiment.orpo.gradient_checkpointing,
    }
    if launcher.trials_per_pass != 1 and any(excludes.values()):
        raise ConfigError(
            f"launcher.trials_per_pass (trials that go through the model together) must be 1 with "
            f"{' and '.join(key for key, on in excludes.items() if on)} but got {launcher.trials_per_pass or 'null'}."
        )


def to_definition(sweep: SweepSpec, experiment: Experiment) -> SweepDefinition:
    """The config's search: the sweep file with its overrides, or one trial with ``sweep=none``."""
    if sweep.file is None:
        point = {"orpo.learning_rate": Constant(experiment.orpo.learning_rate), "orpo.beta": Constant(experiment.orpo.beta)}
        return SweepDefinition("grid", Metric("eval/log_odds_chosen", "maximize"), point, run_cap=1)
    path = expanded(sweep.file)
    definition = with_absolute_values(read_sweep_file(path))
    definition = replace(definition, method=sweep.method or definition.method, run_cap=sweep.run_cap or definition.run_cap)
    if definition.method != "grid" and definition.run_cap is None:
        raise ConfigError(
            f"a sweep of method {definition.method} must say how many trials it runs: give run_cap in {sweep.file}, "
            "or sweep.run_cap=N."
        )
    try:
        return check_definition(definition, experiment)
    except (ConfigError, SpaceError) as error:
        raise type(error)(f"{path}: {error}") from error


def check_definition(definition: SweepDefinition, experiment: Experiment) -> SweepDefinition:
    """``definition`` checked against ``experiment`` and the config keys that it sweeps.

    Each key accepts every value that a sampler may draw, so that no trial fails later. Raises ConfigError or SpaceError.
    """
    if definition.early_terminate and not definition.metric.name.startswith("eval/"):
        raise ConfigError(
            f"early_terminate must go with a metric of evaluations (eval/…) but got {definition.metric.name}: that of a "
            "single training batch is mostly noise."
        )
    goals = (goal.name for goal in definition.goals)
    named = {definition.metric.name, *goals, *(constraint.metric for constraint in definition.constraints)}
    orpo = experiment.orpo
    for metrics, measured, must in (
        (HARM, orpo.eval_harm, "eval_harm must be true but is false"),
        (GENERATION, orpo.eval_generations, "eval_generations must be above 0 but is 0"),
    ):
        if not measured and named.intersection(metrics):
            raise ConfigError(f"orpo.{must}: the sweep file names {', '.join(sorted(named.intersection(metrics)))}.")
    if definition.method == "grid":
        check_grid(definition.parameters)
    fitted = {key: fit_to_key(key, distribution) for key, distribution in definition.parameters.items()}
    notes = tuple(
        f"{key}: {d.kind} is cut off at what the key takes, {d.limits[0]:g} to {d.limits[1]:g} "
        f"({1 - d.share:.1%} of it lies beyond)"
        for key, d in _each_case(fitted)
        if isinstance(d, Truncated)
    )
    definition = replace(definition, parameters=fitted, notes=(*definition.notes, *notes))
    _check_values(definition, experiment)
    return definition


def with_absolute_values(definition: SweepDefinition) -> SweepDefinition:
    """``definition`` with absolute paths of the files and folders that it sweeps over, also in its ``raw`` content."""

    def absolute_value(key: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return absolute(value) if key in ("data.path", "data.eval_path") else absolute_if_folder(value)

    def block(key: str, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        if "parameters" in content:
            return {**content, "parameters": blocks(content["parameters"], f"{key}.")}
        if key not in PATH_KEYS:
            return content
        several = {"values": [absolute_value(key, value) for value in content["values"]]} if "values" in content else {}
        single = {"value": absolute_value(key, content["value"])} if "value" in content else {}
        return {**content, **several, **single}

    def blocks(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        return {name: block(f"{prefix}{name}", inner) for name, inner in content.items()}

    if not any(key in PATH_KEYS for key in definition.parameters):
        return definition
    raw = {**definition.raw, "parameters": blocks(definition.raw["parameters"])}
    return replace(definition, parameters=read_parameters(raw["parameters"]), raw=raw)


def with_sweeps_project(experiment: Experiment, definition: SweepDefinition) -> Experiment:
    """``experiment`` with the sweep file's ``project`` and ``entity``, unless the config sets others."""
    tracker, default = experiment.tracker, TrackerSpec()
    project = definition.project if definition.project and tracker.project == default.project else tracker.project
    entity = tracker.entity or definition.entity
    return replace(experiment, tracker=replace(tracker, project=project, entity=entity))


def _check_values(definition: SweepDefinition, experiment: Experiment) -> None:
    """Check each parameter's limits, or each of its values, against its config key and against the other parameters."""
    for key, distribution in _each_case(definition.parameters):
        value_of: dict[str, Any] = {}
        for value in _values_or_limits(distribution):
            parsed = canonical_json(swept_value(experiment.with_params({key: value}), key))
            if isinstance(distribution, Categorical) and parsed in value_of:
                raise SpaceError(
                    f"{key}: values must be different from each other but {value_of[parsed]!r} and {value!r} are one."
                )
            value_of[parsed] = value
    parents = {d.parent for d in definition.parameters.values() if isinstance(d, Conditional)}
    points = (
        dict(zip(together, values, strict=True))
        for case in cases_of(definition.parameters)
        for together in [
            {k: _values_or_limits(d) for k, d in case.items() if k.startswith(CHECKED_TOGETHER) or k in parents}
        ]
        for values in product(*together.values())
    )
    for point in islice(points, MOST_POINTS):
        try:
            check(experiment.with_params(point))
        except ConfigError as error:
            if not point:
                raise
            raise ConfigError(f"the sweep has a point that is not valid, {' '.join(overrides(point))}: {error}") from error


def fit_to_key(key: str, distribution: Distribution) -> Distribution:
    """The distribution, truncated to the key's bounds if it is a normal one.

    Raises SpaceError when it gives fractions for a key of whole numbers, or lies mostly out of bounds.
    """
    if isinstance(distribution, Conditional):
        cases = tuple((value, fit_to_key(key, case)) for value, case in distribution.cases)
        return Conditional(distribution.parent, cases)  # type: ignore[arg-type]
    if not isinstance(distribution, Numeric):
        return distribution
    bounds = key_bounds(key)
    if bounds.type is int and not distribution.whole:
        raise SpaceError(
            f"{key}: takes whole numbers, but distribution {distribution.kind} also gives fractions. Use int_uniform, or "
            "a q_ distribution with q: 1."
        )
    low, high = bounds.inside(distribution.q)
    if distribution.family not in ("normal", "log_normal") or (low <= distribution.at(0.0) and distribution.at(1.0) <= high):
        return distribution
    truncated = Truncated(distribution.kind, distribution.a, distribution.b, distribution.q, distribution.integer, low, high)
    if truncated.share < LEAST_SHARE or truncated.size == 0:
        raise SpaceError(
            f"{key}: {distribution.kind} with mu {distribution.a:g} and sigma {distribution.b:g} lies mostly beyond what "
            f"the key takes, {bounds}. Give a mu and sigma inside, or use uniform."
        )
    return truncated


def _each_case(parameters: Mapping[str, Distribution]) -> list[tuple[str, Constant | Categorical | Numeric]]:
    """Every parameter; of a conditional one each case."""
    return [
        (key, case)
        for key, d in parameters.items()
        for case in ([inner for _, inner in d.cases] if isinstance(d, Conditional) else [d])
    ]


def _values_or_limits(distribution: Constant | Categorical | Numeric) -> Sequence[Any]:
    """All values of a parameter, or its smallest and its largest."""
    values = distribution.choices if isinstance(distribution, (Categorical, Constant)) else None
    return list(values) if values is not None else [distribution.at(0.0), distribution.at(1.0)]


def variants(experiment: Experiment, definition: SweepDefinition) -> list[Experiment]:
    """One experiment for each model, data set, adapter and optimiser that the sweep's trials may have, at most
    ``MOST_VARIANTS``: what the preflight checks."""
    points = (
        dict(zip(kinds, values, strict=True))
        for case in cases_of(definition.parameters)
        for kinds in [
            {k: d.choices for k, d in case.items() if d.choices and k.startswith((*CHECKED_TOGETHER, *CHECKED_ALONE))}
        ]
        for values in product(*kinds.values())
    )
    return [experiment.with_params(point) for point in islice(points, MOST_VARIANTS)]
