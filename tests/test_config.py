from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.config.compose import compose as compose_command
from isaerft_sweep.errors import ConfigError, SpaceError
from isaerft_sweep.paths import folder
from isaerft_sweep.spec_fields import from_mapping, to_dict
from isaerft_sweep.specs import Experiment, HookPoint, identity

GROUPS = ("model", "data", "adapter", "orpo", "launcher", "tracker")
CHOICES = [f"{group}={file.stem}" for group in GROUPS for file in sorted((folder("conf") / group).glob("*.yaml"))]
SWEEPS = [f"sweep={file.stem}" for file in sorted(folder("sweeps").glob("*.yaml"))]
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "sae_lens", "wandb", "optuna", "scipy", "submitit")


@pytest.mark.parametrize("choice", [*CHOICES, *SWEEPS, "sweep=none"])
def test_every_config_file_composes_and_passes_the_checks(choice: str, experiment, tmp_path: Path) -> None:
    needs = {
        "data=jsonl": [f"data.path={tmp_path}/pairs.jsonl"],
        "adapter=prompt": ["adapter.system_prompt=Hello."],
        "model=hub": ["model.name=org/name", "adapter.sites=[{layer: 3, sae_path: sae}]"],
    }
    composed = experiment(choice, *needs.get(choice, []))
    group, _, name = choice.partition("=")
    assert from_mapping(Experiment, to_dict(composed), "") == composed
    if group == "sweep":
        definition = to_definition(composed.sweep, composed)
        assert composed.sweep.name == name and definition.parameters


def test_the_published_experiment(experiment) -> None:
    composed = experiment("model=gemma-2-2b", "data=ultrafeedback", "adapter=bias", "sweep=reference")
    assert composed.model.name == "google/gemma-2-2b" and composed.model.tokenizer == "google/gemma-2-2b-it"
    assert composed.adapter.sites == (HookPoint(20, "gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"),)
    data, orpo = composed.data, composed.orpo
    assert (data.name, data.train_split, data.eval_split) == (
        "trl-lib/ultrafeedback_binarized",
        "train[:1000]",
        "test[:100]",
    )
    assert (orpo.batch_size, orpo.gradient_accumulation, orpo.max_length, orpo.warmup_steps) == (2, 8, 1024, 10)
    assert (orpo.epochs, orpo.schedule, orpo.eval_fraction) == (1.0, "linear", 0.2)
    assert composed.tags == ("smol-course", "module_1") and composed.tracker.project == "orpo-isaerft-sweep"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("orpo.learning_rate=0", "orpo.learning_rate must be above 0 but got 0.0"),
        ("orpo.learning_rate=nan", "orpo.learning_rate must be finite"),
        ("orpo.beta=-1", "orpo.beta must be at least 0 but got -1.0"),
        ("orpo.schedule=sine", "orpo.schedule must be one of linear, cosine"),
        ("model.dtype=int8", "model.dtype must be one of auto, float32"),
        ("adapter.kind=vera", "adapter.kind must be one of bias, scale, linear, mlp"),
        ("adapter.sites=[]", "adapter.sites must name at least one hook point"),
        ("adapter.sites.0.sae_path=/x", "either sae_release with sae_id, or sae_path"),
        ("adapter.rank=4", "adapter.rank must go with adapter.kind linear, mlp, lora, loreft"),
        ("data=jsonl", "data.path must name a file"),
        ("launcher.slots=0", "launcher.slots must be at least 1"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_valid(override: str, said: str, experiment) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        experiment(override)


@pytest.mark.parametrize("override", ["orpo.lerning_rate=1", "model=gemma-9", "orpo.max_steps=many"])
def test_hydra_refuses_unknown_keys_and_wrong_types(override: str, experiment) -> None:
    with pytest.raises((ConfigCompositionException, Exception), match=r"lerning_rate|gemma-9|many"):
        experiment(override)


def test_a_sweep_value_that_the_config_would_refuse_is_found_before_any_trial(experiment, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("method: grid\nmetric: {name: eval/loss}\nparameters: {orpo.beta: {values: [0.1, -0.1]}}\n")
    composed = experiment("sweep=none", f"sweep.file={file}")
    with pytest.raises(ConfigError, match=r"orpo.beta must be at least 0 but got -0.1"):
        to_definition(composed.sweep, composed)
    file.write_text("method: random\nmetric: {name: eval/loss}\nparameters: {orpo.beta: {min: 0.1, max: 0.2}}\n")
    with pytest.raises(ConfigError, match=r"must say how many trials it runs"):
        to_definition(composed.sweep, composed)
    file.write_text("method: random\nmetric: {name: eval/loss}\nparameters: {orpo.bta: {min: 0.1, max: 0.2}}\n")
    with pytest.raises(SpaceError, match=r"Did you mean 'orpo.beta'"):
        to_definition(composed.sweep, composed)


def test_identity_is_pinned_and_ignores_what_cannot_change_a_result(experiment) -> None:
    base = experiment("model=tiny")
    assert identity(base) == "0908c920f434"
    for same in ("orpo.checkpoint_every_steps=7", "launcher.slots=3", "tracker=disabled", "name=x", "model.license=mit"):
        assert identity(experiment("model=tiny", same)) == identity(base), same
    for other in ("orpo.beta=0.3", "orpo.seed=1", "data.seed=1", "adapter=scale", "model.dtype=bfloat16"):
        assert identity(experiment("model=tiny", other)) != identity(base), other


def test_composing_loads_nothing_heavy_and_is_quick() -> None:
    """A fresh process: `--cfg job` in under a second of processor time, without torch and its kin."""
    probe = (
        "import atexit, sys, isaerft_sweep.launch as l; sys.argv=['launch','--cfg','job'];"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)); l.run()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "[]"
    assert "learning_rate" in done.stdout
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.0


def test_the_orchestrator_never_imports_torch() -> None:
    probe = (
        "import sys, isaerft_sweep.controller.run_sweep, isaerft_sweep.dispatch.local, isaerft_sweep.dispatch.slurm.dispatcher,"
        " isaerft_sweep.cli, isaerft_sweep.results.card.model_card, isaerft_sweep.controller.session, isaerft_sweep.controller.static_array,"
        " isaerft_sweep.readiness.plan, isaerft_sweep.readiness.doctor, isaerft_sweep.readiness.fetch;"
        "print([m for m in ('torch','transformers','peft','trl','datasets','sae_lens','wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_the_groups(launch) -> None:
    shown = launch("--help").stdout
    groups = {line.split(": ")[0]: line.split(": ")[1].split(", ") for line in shown.splitlines() if ": " in line}
    assert {"gemma-2-2b", "gemma-3-1b-it", "hub", "smollm2-135m", "tiny"} <= set(groups["model"])
    assert "sweep: compare, demo, grid, none, quick, reference, reference-bayes" in shown


def test_shell_completion_offers_the_choices() -> None:
    """As bash asks for it after `eval "$(isaerft-launch -sc install=bash)"`."""
    env = {**os.environ, "COMP_LINE": "isaerft-launch model=", "COMP_POINT": "21"}
    command = [str(Path(sys.executable).parent / "isaerft-launch"), "-sc", "query=bash"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "model=tiny" in done.stdout


def test_an_unknown_choice_ends_with_one_clear_error(launch) -> None:
    done = launch("model=gemma-9")
    assert done.returncode == 2 and "there is no model 'gemma-9'" in done.stderr and "Traceback" not in done.stderr
    done = launch("orpo.beta=-1")
    assert done.returncode == 2 and done.stderr.strip() == "error: orpo.beta must be at least 0 but got -1.0."


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("orpo.betta=1", "'orpo.betta' is not a config key. Did you mean 'orpo.beta'?"),
        ("=5", "a config group must be set to the name of one of its files"),
        ("orpo=null", "a config group must be set to the name of one of its files"),
        ("=", "'' is not a config key."),
        ("~orpo.betta", "betta"),
        ("~orpo.beta", "orpo.beta cannot be removed: every config has it. Set it: orpo.beta=VALUE."),
        ("adaptr=bias", "'adaptr' is not a config key. Did you mean 'adapter'?"),
        ("adapter=bia", "there is no adapter 'bia'. Did you mean 'bias'? Valid: bias,"),
        ("sweep=dem", "there is no sweep 'dem'. Did you mean 'demo'?"),
        ("orpo.beta=abc", "orpo.beta cannot be abc: Value 'abc' of type 'str' could not be converted to Float."),
        ("orpo.beta", "'orpo.beta' must have the form KEY=VALUE"),
        ("orpo.beta=[1", "'orpo.beta=[1' must have the form KEY=VALUE"),
        ("+orpo.beta=1", "'orpo.beta' is a config key already: leave the + out"),
        ("adapter.sites.0.lay=3", "Did you mean 'layer'?"),
        ("launcher.slurm.partiton=x", "Did you mean 'partition'?"),
        ("data.path=a,b", "data.path must have one value but got a,b."),
        ("orpo.beta=-1", "orpo.beta must be at least 0 but got -1.0."),
    ],
)
def test_a_bad_override_gets_one_line(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_command([override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["orpo.betta=1", "adapter=bia", "orpo.beta"])
def test_launch_says_it_and_exits_with_2(override: str, launch: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = launch(override)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "license"),
    [
        (("model=gemma-2-2b",), "gemma"),
        (("model=gemma-2-2b", "model.name=meta-llama/Llama-3.2-1B"), None),
        (("model=gemma-2-2b", "model.name=/models/gemma-2-2b"), "gemma"),
        (("model=gemma-2-2b", "model.name=me/other", "model.license=mit"), "mit"),
        (("model=tiny", "model.name=other"), None),
        (("model=smollm2-135m",), "apache-2.0"),
    ],
)
def test_a_license_belongs_to_the_model_of_that_name(
    given: tuple[str, ...], license: str | None, experiment: Callable[..., Experiment]
) -> None:
    """The card of a model that was chosen by name alone says no license of another one's."""
    assert experiment(*given).model.license == license


def test_a_license_belongs_to_the_data_of_that_name(experiment: Callable[..., Experiment]) -> None:
    assert experiment("data=ultrafeedback", "model=tiny").data.license == "mit"
    assert experiment("data=ultrafeedback", "model=tiny", "data.name=lab/other").data.license is None
