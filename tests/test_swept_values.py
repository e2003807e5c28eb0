"""Values of a sweep on their way to a trial: as overrides, from an agent's command line, and checked together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from conftest import TINY
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from isaerft_sweep.config.boundary import to_definition, variants
from isaerft_sweep.config.compose import compose, from_agent
from isaerft_sweep.controller.agent import point_from_agent
from isaerft_sweep.errors import ConfigError, IsaerftError, LaunchError
from isaerft_sweep.spec_fields import overrides
from isaerft_sweep.specs import Experiment, HookPoint
from isaerft_sweep.trial.prepare import prepare

Composed = Callable[..., Experiment]
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
KEYS = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(
    lambda key: key not in ("null", "true", "false", "inf", "nan")
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


@given(VALUES)
def test_hydra_reads_what_was_written(value: Any) -> None:
    parsed = OverridesParser.create().parse_override(f"{overrides({'a.b': value})[0]}")
    assert not parsed.is_sweep_override(), "a comma in a text is no second value"
    found = plain(parsed.value())
    assert found == value and type(found) is type(value)


def plain(value: Any) -> Any:
    """Without the marks that Hydra's parser leaves for OmegaConf."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, str):
        return str(getattr(value, "text", value)).replace("\\${", "${")
    if isinstance(value, hydra.core.override_parser.types.QuotedString):
        return value.text.replace("\\${", "${")
    return value


def test_the_config_gets_what_was_swept() -> None:
    sites = [{"layer": 1, "sae_path": "/a b,c/it's {x}"}]
    params = {"adapter.top_k": None, "adapter.sites": sites, "data.path": "/d/o'brien, ${x}.jsonl", "orpo.beta": 1e-05}
    composed = compose(["data=jsonl", *overrides(params)])
    assert composed.adapter.sites == (HookPoint(1, sae_path="/a b,c/it's {x}"),) and composed.adapter.top_k is None
    assert composed.data.path == "/d/o'brien, ${x}.jsonl" and composed.orpo.beta == 1e-05


AGENTS_VALUES = {
    "adapter.top_k": None,
    "orpo.beta": 0.1,
    "orpo.learning_rate": 1e-05,
    "orpo.gradient_checkpointing": True,
    "data.path": "/a b,c",
    "adapter.sites": [{"layer": 1, "sae_path": "/x"}],
}
MACROS = ("args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_json", "args_json_file",
          "args_append_hydra", "args_override_hydra", "args_dict", "")  # fmt: skip


def agents_file(tmp_path: Path, values: dict[str, Any]) -> dict[str, str]:
    file = tmp_path / "config-defaults.yaml"
    file.write_text(yaml.safe_dump({"wandb_version": 1, **{key: {"value": value} for key, value in values.items()}}))
    return {"WANDB_SWEEP_PARAM_PATH": str(file)}


def filled_in(macro: str, values: dict[str, Any], tmp_path: Path) -> list[str]:
    """What W&B's own code puts in the place of a macro."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    made = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    if macro == "args_json_file":
        (tmp_path / "args.json").write_text(made["args_json"][0])
        return [str(tmp_path / "args.json")]
    return list(made[macro]) if macro else []


@pytest.mark.parametrize("macro", MACROS)
def test_the_trial_gets_what_the_agent_gave_whatever_the_commands_macro(macro: str, tmp_path: Path) -> None:
    environment = agents_file(tmp_path, AGENTS_VALUES)
    arguments = ["model=tiny", "orpo.beta=1.0", *filled_in(macro, AGENTS_VALUES, tmp_path), "name=x"]
    composed = compose(from_agent(arguments, environment))
    assert composed.orpo.beta == 0.1, "not the value that the command or the config has"
    assert composed.orpo.learning_rate == 1e-05 and composed.orpo.gradient_checkpointing
    assert composed.adapter.top_k is None and composed.data.path == "/a b,c"
    assert composed.adapter.sites == (HookPoint(1, sae_path="/x"),) and composed.name == "x"


@pytest.mark.parametrize("macro", MACROS)
def test_nested_parameters_arrive_too(macro: str, tmp_path: Path) -> None:
    values = {"orpo": {"beta": 0.3, "learning_rate": 0.02}, "adapter": {"kind": "scale"}}
    composed = compose(from_agent(filled_in(macro, values, tmp_path), agents_file(tmp_path, values)))
    assert (composed.orpo.beta, composed.orpo.learning_rate, composed.adapter.kind) == (0.3, 0.02, "scale")


def test_without_an_agents_file_the_command_line_stays(tmp_path: Path) -> None:
    assert from_agent(["orpo.beta=0.1"], {}) == ["orpo.beta=0.1"]
    with pytest.raises(LaunchError, match="WANDB_SWEEP_PARAM_PATH must name the file"):
        from_agent(["orpo.beta=0.1"], {"WANDB_SWEEP_PARAM_PATH": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="must be a config key but got 'lr'"):
        from_agent([], agents_file(tmp_path, {"lr": 0.1}))


def test_what_the_config_has_is_checked_against_what_the_agent_gave(experiment: Composed, tmp_path: Path) -> None:
    composed = experiment("sweep=quick", "orpo.beta=1.0")
    definition = to_definition(composed.sweep, composed)
    with pytest.raises(LaunchError, match=r"orpo\.beta must be what the agent gave, 0\.1, but the config has 1\.0"):
        point_from_agent(composed, definition, agents_file(tmp_path, {"orpo.beta": 0.1}))
    assert point_from_agent(composed, definition, agents_file(tmp_path, {"orpo.beta": 1})).params == {"orpo.beta": 1.0}


def swept(tmp_path: Path, **parameters: list[Any]) -> str:
    """A sweep file of a grid; ``__`` stands for the dot of a key."""
    file = tmp_path / "grid.yaml"
    content = {
        "program": "isaerft_sweep.launch",
        "method": "grid",
        "metric": {"name": "eval/log_odds_chosen", "goal": "maximize"},
        "parameters": {
            "orpo.learning_rate": {"values": [0.1, 0.2]},
            "orpo.beta": {"value": 0.1},
            **{key.replace("__", "."): {"values": values} for key, values in parameters.items()},
        },
    }
    file.write_text(yaml.safe_dump(content))
    return f"sweep.file={file}"


def checked(experiment: Composed, tmp_path: Path, *options: str, **parameters: list[Any]) -> list[Experiment]:
    composed = experiment(*TINY, *options, "sweep=none", swept(tmp_path, **parameters))
    return variants(composed, to_definition(composed.sweep, composed))


def test_what_is_swept_together_must_go_together(experiment: Composed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.l1=0\.5 adapter\.top_k=50: .* must not be set together"):
        checked(experiment, tmp_path, adapter__l1=[None, 0.5], adapter__top_k=[None, 50])
    found = checked(experiment, tmp_path, adapter__kind=["linear", "mlp"], adapter__rank=[4, 16])
    assert [(e.adapter.kind, e.adapter.rank) for e in found] == [("linear", 4), ("linear", 16), ("mlp", 4), ("mlp", 16)]
    with pytest.raises(ConfigError, match=r"adapter\.kind=bias adapter\.rank=4"):
        checked(experiment, tmp_path, adapter__kind=["bias", "mlp"], adapter__rank=[4])
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        checked(experiment, tmp_path, adapter__kind=["mlp"], adapter__rank=[4, -1])


def test_learning_rates_alone_need_one_look(experiment: Composed, tmp_path: Path) -> None:
    assert len(checked(experiment, tmp_path)) == 1


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"data__path": ["there", "missing"]}, "missing"),
        ({"orpo__optimizer": ["adamw_torch", "adamw_troch"]}, "Did you mean 'adamw_torch'"),
        ({"orpo__optimizer": ["adamw_torch", "paged_adamw_8bit"]}, "needs the package bitsandbytes"),
        ({"model__attention": ["sdpa", "flash_attention_2"]}, "needs the package flash-attn"),
        ({"model__architecture": ["llama", "lama"]}, "lama"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_every_value_is_looked_at_before_the_first_trial(
    parameters: dict[str, list[Any]], said: str, experiment: Composed, tmp_path: Path
) -> None:
    pairs = tmp_path / "there"
    pairs.write_text("\n".join(json.dumps({"prompt": f"{i}? ", "chosen": f"{i}!", "rejected": "no"}) for i in range(40)))
    pairs.rename(tmp_path / "there.jsonl")
    if "data__path" in parameters:
        parameters = {"data__path": [str(tmp_path / f"{name}.jsonl") for name in parameters["data__path"]]}
    options = ("data=jsonl", f"data.path={tmp_path / 'there.jsonl'}", "data.eval_size=8")
    with pytest.raises(IsaerftError) as caught:
        seen: dict[str, Any] = {}
        for variant in checked(experiment, tmp_path, *options, **parameters):
            prepare(variant, seen)
    assert said in str(caught.value)
