"""The model card of a trial: all that the published run's card holds, and what is needed to trust and load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from isaerft_sweep.environment import versions
from isaerft_sweep.metrics import depends_on_beta
from isaerft_sweep.specs import TrialSpec

BADGE = "https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg"
SHOWN = ("eval/log_odds_chosen", "eval/rewards/accuracies", "eval/rewards/margins", "eval/nll_loss", "eval/loss")
FRAMEWORKS = {
    "trl": "TRL",
    "transformers": "Transformers",
    "torch": "PyTorch",
    "datasets": "Datasets",
    "tokenizers": "Tokenizers",
    "peft": "PEFT",
    "sae-lens": "SAELens",
}
BLOCKS = {
    "bias": "f + b",
    "scale": "f · (1 + s)",
    "linear": "f + Wf + c",
    "mlp": "f + MLP(f)",
}
CITATIONS = """\
Cite ORPO as:

```bibtex
@article{hong2024orpo,
    title        = {{ORPO: Monolithic Preference Optimization without Reference Model}},
    author       = {Jiwoo Hong and Noah Lee and James Thorne},
    year         = 2024,
    eprint       = {arXiv:2403.07691}
}
```

Cite TRL as:

```bibtex
@misc{vonwerra2022trl,
    title        = {{TRL: Transformer Reinforcement Learning}},
    author       = {Leandro von Werra and Younes Belkada and Lewis Tunstall and Edward Beeching and Tristan Thrush and Nathan Lambert and Shengyi Huang and Kashif Rasul and Quentin Gallou{\\'e}dec},
    year         = 2020,
    journal      = {GitHub repository},
    publisher    = {GitHub},
    howpublished = {\\url{https://github.com/huggingface/trl}}
}
```
"""


def write_card(
    spec: TrialSpec,
    results: Mapping[str, Any],
    url: str | None,
    offline_folder: str | None,
    sites: Sequence[Mapping[str, Any]],
) -> str:
    """The card's text.

    Args:
        spec: the trial.
        results: its ``metrics``, ``untrained`` metrics and ``seconds``.
        url: the W&B run's address when it is online.
        offline_folder: the W&B run's folder when it is offline.
        sites: the adapter's sites, with their SAEs' fingerprints.
    """
    parts = [
        f"---\n{_front_matter(spec)}---",
        f"# Model Card for {spec.model_name}",
        _introduction(spec),
        _quick_start(spec),
        _training(spec, results, url, offline_folder),
        _adapter(spec, sites),
        _evaluation(spec, results),
        "### Framework versions\n\n" + "\n".join(_framework_lines()),
        "## Citations\n\n" + CITATIONS,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front_matter(spec: TrialSpec) -> str:
    model, data = spec.experiment.model, spec.experiment.data
    content: dict[str, Any] = {
        "base_model": model.name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "model_name": spec.model_name,
        "tags": list(spec.tags),
        "licence": "license",
    }
    if model.license:
        content["license"] = model.license
    if data.source == "hub":
        content["datasets"] = [data.name]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _introduction(spec: TrialSpec) -> str:
    model = spec.experiment.model
    data = spec.experiment.data
    what = (
        f"[{data.name}](https://huggingface.co/datasets/{data.name})" if data.source == "hub" else (data.path or data.name)
    )
    return (
        f"This model is a fine-tuned version of [{model.name}](https://huggingface.co/{model.name}) on {what}: an "
        "ISAERFT adapter, a small trainable block in the latent space of a frozen sparse autoencoder (SAE).\n"
        "It has been trained using [TRL](https://github.com/huggingface/trl)."
    )


def _quick_start(spec: TrialSpec) -> str:
    return """## Quick start

In the folder of this card, or with its Hub name instead of `"."`, and with `isaerft-sweep` installed:

```python
from isaerft_sweep.adapter import load_model
from transformers import pipeline

model, tokenizer = load_model(".")
question = "If you had a time machine, but could only go to the past or the future once and never return, which would you choose and why?"
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
output = generator([{"role": "user", "content": question}], max_new_tokens=128, return_full_text=False)[0]
print(output["generated_text"])
```"""


def _training(spec: TrialSpec, results: Mapping[str, Any], url: str | None, offline_folder: str | None) -> str:
    orpo = spec.experiment.orpo
    if url:
        tracked = f'[<img src="{BADGE}" alt="Visualize in Weights & Biases" width="150" height="24"/>]({url})'
    elif offline_folder:
        tracked = f"W&B run `{spec.run_id}` of sweep `{spec.sweep_id}`, written offline; `wandb sync` uploads it."
    else:
        tracked = "Not tracked in W&B."
    return f"""## Training procedure

{tracked}

This model was trained with ORPO, a method introduced in [ORPO: Monolithic Preference Optimization without Reference \
Model](https://huggingface.co/papers/2403.07691).

| | |
| --- | --- |
| run | `{spec.name}` |
| sweep | `{spec.sweep_name}` (`{spec.sweep_id}`), trial {spec.index}, ranked by `{spec.metric}` ({spec.goal}) |
| learning rate | {orpo.learning_rate!r} |
| beta | {orpo.beta!r} |
| batch | {orpo.batch_size} × {orpo.gradient_accumulation} pairs, at most {orpo.max_length} tokens |
| schedule | {orpo.schedule}, {orpo.warmup_steps} warm-up steps, {_length(spec)} |
| seed | {orpo.seed} |
| device time of the last attempt | {results.get("seconds", 0) / 3600:.3f} h |
| git commit | {spec.git_commit or "not from a git checkout"} |

To reproduce it:

```sh
{spec.command}
```"""


def _length(spec: TrialSpec) -> str:
    orpo = spec.experiment.orpo
    return f"{orpo.max_steps} steps" if orpo.max_steps > 0 else f"{orpo.epochs:g} epochs"


def _adapter(spec: TrialSpec, sites: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"| output of decoder layer {site['layer']} | {site.get('sae_path') or site.get('sae_release')} "
        f"| {site.get('sae_id') or ''} | `{site.get('fingerprint')}` |"
        for site in sites
    ]
    kind = spec.experiment.adapter.kind
    return (
        f"## Adapter\n\nKind `{kind}`: the latents f become {BLOCKS[kind]}; the SAE's reconstruction error is kept.\n\n"
        "| site | SAE release | SAE id | fingerprint |\n| --- | --- | --- | --- |\n" + "\n".join(lines)
    )


def _evaluation(spec: TrialSpec, results: Mapping[str, Any]) -> str:
    metrics, untrained = results.get("metrics", {}), results.get("untrained", {})
    names = [spec.metric, *(name for name in SHOWN if name != spec.metric)]
    lines = [
        f"| {name}{' ¹' if depends_on_beta(name) else ''} | {_number(untrained.get(name))} | {_number(metrics[name])} |"
        for name in names
        if name in metrics
    ]
    return (
        "## Evaluation\n\nOn the held-out pairs:\n\n| metric | untrained | trained |\n| --- | --- | --- |\n"
        + "\n".join(lines)
        + "\n\n¹ contains beta itself, so it cannot be compared between runs of different beta."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _framework_lines() -> list[str]:
    found = versions()
    return [f"- {label}: {found[name]}" for name, label in FRAMEWORKS.items() if name in found]
