"""The model card of a trial: the content of the published run's card, and what you need to trust and load the model.

Only the trial's folder is read. The worker writes the card when the trial ends; the sweep rewrites it with the rank.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isaerft_sweep.errors import CardError
from isaerft_sweep.journal.atomic_files import read_json, write_text
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.metrics import GENERATION, HARM, depends_on_beta
from isaerft_sweep.naming import NOT_TRAINED
from isaerft_sweep.paths import asset
from isaerft_sweep.results.card.card_data import front_matter, is_repository
from isaerft_sweep.results.card.card_text import (
    ABOUT,
    ALONE,
    BLOCKS,
    FRAMEWORKS,
    ISAERFT,
    WITH_ADAPTER,
    WITH_OWN_CODE,
    citations,
    method,
    quick_start,
)
from isaerft_sweep.results.latents import read_latents
from isaerft_sweep.results.standing import Standing, standings
from isaerft_sweep.results.sweep_results import SweepResults
from isaerft_sweep.specs import AdapterSpec, TrialSpec

TEMPLATE = "card.md.jinja"
BADGE = "https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg"
SHOWN_METRICS = (
    "eval/log_odds_chosen",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "eval/nll_loss",
    "eval/loss",
    *HARM,
    *GENERATION,
)
MAX_LATENTS = 10


VERSION_OF = {"prompt": "a system prompt for", "diffmean": "a steered version of"}
"""How a card names what the kinds of adapter make that are not trained."""


def make_card(
    trial: TrialFolder,
    results: TrialStatus,
    adapter: Path,
    standing: Standing | None = None,
    template: Path | None = None,
) -> str:
    """The card's text.

    Args:
        trial: the trial's folder.
        results: its final status.
        adapter: the folder with the adapter's config and weights.
        standing: the trial's rank in its sweep, if known.
        template: a custom Jinja template; None: the one that ships with the package.

    Raises CardError when the template cannot be read or uses an unknown field.
    """
    return render(template or asset(TEMPLATE), card_fields(trial, results, adapter, standing))


def card_fields(trial: TrialFolder, results: TrialStatus, adapter: Path, standing: Standing | None) -> dict[str, str]:
    """Every field that a template may use, as text.

    Args: as of ``make_card``.
    """
    spec = trial.read_spec()
    orpo, model, data = spec.experiment.orpo, spec.experiment.model, spec.experiment.data
    environment = read_json(trial.environment) or {}
    seconds = standing.seconds if standing else results.seconds or 0
    return {
        "front_matter": front_matter(spec, results.metrics),
        "model_name": spec.model_name,
        "base_model_link": _link(model.name, f"https://huggingface.co/{model.name}"),
        "data_link": _link(data.name, f"https://huggingface.co/datasets/{data.name}")
        if data.source == "hub"
        else data.path or data.name,
        "quick_start": quick_start(WITH_ADAPTER, spec.experiment.adapter.system_prompt),
        "tracked": _tracked(spec, results.wandb),
        "run_name": spec.name,
        "learning_rate": repr(orpo.learning_rate),
        "beta": repr(orpo.beta),
        "batch": f"{orpo.batch_size} × {orpo.gradient_accumulation} pairs, at most {orpo.max_length} tokens",
        "pairs": _pairs(results.pairs),
        "schedule": f"{orpo.schedule}, {orpo.warmup_steps} warm-up steps, {_length(spec)}",
        "seed": str(orpo.seed),
        "tokens": f"{results.metrics.get('train/num_tokens', 0):,.0f}",
        "device_hours": f"{seconds / 3600:.3f} h on {environment.get('torch_device', 'an unknown device')}",
        "git_commit": spec.git_commit or "not from a git checkout",
        "command": spec.command,
        "sweep": _sweep(spec, standing),
        "kind": spec.experiment.adapter.kind,
        "block": BLOCKS[spec.experiment.adapter.kind],
        "about": ABOUT.get(spec.experiment.adapter.kind, ISAERFT),
        "changed": _changed(spec.experiment.adapter),
        "version_of": VERSION_OF.get(spec.experiment.adapter.kind, "a fine-tuned version of"),
        "parameters": "Nothing is trained."
        if spec.experiment.adapter.kind in NOT_TRAINED
        else f"{count_parameters(adapter):,} trained parameters.",
        "sites": sites_table(adapter),
        "learned": _learned(trial),
        "evaluation": _evaluation(spec, results, standing),
        "framework_versions": _versions(environment.get("packages", {})),
        "citations": citations(orpo.loss),
        "method": method(orpo.loss),
        "training": _training(spec.experiment.adapter.kind, orpo.loss),
    }


def render(template: Path, fields: Mapping[str, str]) -> str:
    """Fill a template. Raises CardError with the template, the field and the valid fields."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(fields)
    except (OSError, UnicodeDecodeError) as error:
        raise CardError(f"the card template {template} cannot be read: {error}.") from error
    except jinja2.UndefinedError as error:
        raise CardError(
            f"the card template {template} uses an unknown field: {error.message}. Fields: {', '.join(sorted(fields))}."
        ) from error
    except jinja2.TemplateError as error:
        raise CardError(f"the card template {template} is not a valid Jinja template: {error}.") from error
    except Exception as error:  # an expression in the template can raise anything
        raise CardError(
            f"the card template {template} cannot be filled: {type(error).__name__}: {error}. Every field is text."
        ) from error


def exported_card(card: str, own_code: bool) -> str:
    """The card of an export, from its adapter's card: quick start and library become plain transformers.

    ``own_code``: whether loading the export needs ``trust_remote_code``.
    """
    text = card.replace("\nlibrary_name: peft\n", "\nlibrary_name: transformers\n", 1)
    start = text.find("## Quick start")
    if start < 0:  # a custom template without a quick start
        return text
    end = text.find("\n## ", start + 1)
    replacement = quick_start(WITH_OWN_CODE if own_code else ALONE)
    return f"{text[:start]}## Quick start\n\n{replacement}\n{text[end:] if end > 0 else ''}"


def write_card(trial: TrialFolder, adapter: Path, text: str) -> None:
    """Write the card into the folders of the trial and its adapter."""
    for path in (trial.card, adapter / "README.md"):
        write_text(path, text)
    write_text(trial.card_digest, _digest(text))


def refresh_card(trial: TrialFolder, standing: Standing | None = None, template: Path | None = None) -> None:
    """Rewrite the card of a completed trial. A card from a custom template is never overwritten later."""
    write_card(trial, trial.adapter, make_card(trial, trial.read_status(), trial.adapter, standing, template))
    if template:
        trial.card_digest.unlink()


def refresh_cards(sweep: SweepResults) -> None:
    """Rewrite every completed trial's card with its rank in the sweep; cards that a user edited are kept."""
    for entry, standing in standings(sweep):
        if entry.folder and entry.folder.adapter.is_dir() and _is_unedited(entry.folder):
            refresh_card(entry.folder, standing)


def _is_unedited(trial: TrialFolder) -> bool:
    """Whether both cards are unchanged since this package wrote them."""
    try:
        cards = {_digest(path.read_text(encoding="utf-8")) for path in (trial.card, trial.adapter / "README.md")}
        return cards == {trial.card_digest.read_text(encoding="utf-8")}
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _link(name: str, address: str) -> str:
    return f"[{name}]({address})" if is_repository(name) else name


def _tracked(spec: TrialSpec, wandb: Mapping[str, Any]) -> str:
    if wandb.get("url"):
        badge = f'[<img src="{BADGE}" alt="Visualize in Weights & Biases" width="150" height="24"/>]({wandb["url"]})'
        return f"{badge}\n\nIts sweep: {wandb['sweep_url']}" if wandb.get("sweep_url") else badge
    if wandb.get("offline"):
        return f"W&B run `{spec.run_id}` of sweep `{spec.sweep_id}`, written offline; `wandb sync` uploads it."
    return "Not tracked in W&B."


def _length(spec: TrialSpec) -> str:
    orpo = spec.experiment.orpo
    return f"{orpo.max_steps} steps" if orpo.max_steps > 0 else f"{orpo.epochs:g} epochs"


def _pairs(counts: Mapping[str, Any]) -> str:
    """How many pairs were trained on, held out, left out and truncated; ``counts`` is the status's ``pairs``."""
    if not counts:
        return "not recorded"
    left_out = [f"{count} left out ({reason})" for reason, count in counts["left_out"].items() if count]
    notes = [f"{count} {note}" for note, count in counts["notes"].items() if count]
    parts = [f"{counts['trained']} trained on", f"{counts['held_out']} held out", *(left_out or ["none left out"])]
    return ", ".join([*parts, f"{counts['cut']} cut at the length limit", *notes])


def _sweep(spec: TrialSpec, standing: Standing | None) -> str:
    sentence = f"Trial {spec.index + 1} of the sweep `{spec.sweep_name}` (`{spec.sweep_id}`), ranked by `{spec.metric}` ({spec.goal})."
    return f"{sentence}\n\n{standing.as_markdown()}" if standing else sentence


def count_parameters(adapter: Path) -> int:
    """The adapter's number of parameters, from the safetensors header: 8 bytes of length, then JSON."""
    path = adapter / "adapter_model.safetensors"
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("it is cut short")
            header = json.loads(file.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise CardError(f"{path} must hold the adapter's weights but cannot be read: {error}.") from error
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for size in tensor["shape"]:
                count *= size
            total += count
    return total


def _training(kind: str, loss: str) -> str:
    """How the model was trained, if it was."""
    if kind in NOT_TRAINED:
        return f"Nothing was trained; the evaluation's loss is that of {method(loss)}."
    return f"This model was trained with {method(loss)}."


def _changed(adapter: AdapterSpec) -> str:
    """What the block changes, for the card's sentence on the adapter."""
    kind = adapter.kind
    if kind == "prompt":
        return f"the model stays as it is, and before every prompt stands the system prompt {adapter.system_prompt!r}"
    if kind == "lora":
        return f"a linear map Wx of the layers above the hook point becomes {BLOCKS[kind]}"
    if kind in ("vector", "diffmean", "loreft"):
        return f"the residual stream x becomes {BLOCKS[kind]}"
    return f"the latents f become {BLOCKS[kind]}; the SAE's reconstruction error is kept"


def sites_table(adapter: Path) -> str:
    """The adapter's sites and their SAEs."""
    sites = (read_json(adapter / "adapter_config.json") or {}).get("sites", [])
    lines = [
        f"| output of decoder layer {site['layer']} | {site.get('sae_path') or site.get('sae_release') or 'none'} "
        f"| {site.get('sae_id') or ''} | {_fingerprint(site.get('fingerprint'))} |"
        for site in sites
    ]
    if not sites:
        return ""
    return "| site | SAE release | SAE id | fingerprint |\n| --- | --- | --- | --- |\n" + "\n".join(lines)


def _fingerprint(fingerprint: str | None) -> str:
    return f"`{fingerprint}`" if fingerprint else "not read yet"


def _learned(trial: TrialFolder) -> str:
    parts = []
    for site in read_latents(trial.latents):
        lines = []
        for latent in site.top(MAX_LATENTS):
            link = site.link(latent)
            name = f"[{latent}]({link})" if link else str(latent)
            lines.append(
                f"| {name} | {site.moved[latent]:+.4f} | {site.share[latent]:.1%} | {site.before[latent]:.1%} | {site.after[latent]:.1%} |"
            )
        moved = int((site.moved != 0).sum())
        parts.append(
            f"The adapter moved {moved:,} of {site.d_sae:,} latents at layer {site.layer}; the steering vector has length "
            f"{site.norm:.3g}. Those with the largest part in it, and on how many of {site.tokens:,} held-out tokens they are active "
            "without and with the adapter:\n\n| latent | moved by | share | active before | after |\n| --- | --- | --- | --- | --- |\n"
            + "\n".join(lines)
        )
    return "\n\n".join(parts)


def _evaluation(spec: TrialSpec, results: TrialStatus, standing: Standing | None) -> str:
    metrics = results.metrics
    untrained = results.untrained or (standing.untrained if standing else {})
    names = [spec.metric, *(name for name in SHOWN_METRICS if name != spec.metric)]
    names += [name.replace("eval/", "test/") for name in names if name.replace("eval/", "test/") != name]
    lines = [
        f"| {name}{' ¹' if depends_on_beta(name) else ''} | {_number(untrained.get(name))} | {_number(metrics[name])} |"
        for name in names
        if name in metrics
    ]
    return (
        "On the held-out pairs (eval), by which trials are ranked, and on test pairs, which no ranking has seen:\n\n| metric | untrained | trained |\n| --- | --- | --- |\n"
        + "\n".join(lines)
        + "\n\n¹ contains beta itself, so it cannot be compared between runs of different beta."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _versions(packages: Mapping[str, str]) -> str:
    return "\n".join(f"- {label}: {packages[name]}" for name, label in FRAMEWORKS.items() if name in packages)
