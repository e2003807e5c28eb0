"""The presets of models: each composes, and names an SAE that sae_lens lists, of that model and that layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from isaerft_sweep.paths import folder
from isaerft_sweep.specs import Experiment

PRESETS = sorted(path.stem for path in Path(folder("conf"), "model").glob("*.yaml"))
OWN = ("hub", "tiny", "smollm2-135m")
"""Without an SAE of sae_lens's list."""
LICENSES = {"gemma": "gemma", "Llama-3.1": "llama3.1", "Qwen": "apache-2.0", "gpt-oss": "apache-2.0"}


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in OWN])
def test_a_preset_composes_and_its_sae_is_of_that_model_and_layer(name: str, experiment: Callable[..., Experiment]) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    composed = experiment(f"model={name}", "sweep=none")
    model, (hook_point,) = composed.model, composed.adapter.sites
    release = get_pretrained_saes_directory()[str(hook_point.sae_release)]
    assert str(hook_point.sae_id) in release.saes_map
    assert release.model.split("/")[-1].lower() == model.short_name.lower()
    numbers = re.findall(r"\d+", str(hook_point.sae_id))
    assert str(hook_point.layer) == numbers[0], "the SAE's layer"
    assert "resid_pre" not in release.saes_map[str(hook_point.sae_id)]
    assert model.license == next(value for part, value in LICENSES.items() if part in model.name)


def test_every_preset_is_in_the_guide() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "guide.md").read_text(encoding="utf-8")
    assert not [name for name in PRESETS if f"`{name}`" not in guide]
