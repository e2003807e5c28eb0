"""Checks everything that a trial needs, in a separate process, before any trial is dispatched.

Also creates what workers share (converted weights, tiny models). Reads experiments as JSON from standard input and prints
one JSON line: ``{"ok": …}`` with a summary for the user, or ``{"error": …}``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isaerft_sweep.adapter.config import ON_SAE
from isaerft_sweep.adapter.hook import check_hook
from isaerft_sweep.adapter.sae import OWN_RELEASE, FrozenSae, check_fits, describe, load_sae, stream_basis
from isaerft_sweep.adapter.system_prompt import SystemPrompt
from isaerft_sweep.errors import ConfigError, IsaerftError, ModelError, suggest
from isaerft_sweep.models.loading import load, load_config, load_tokenizer, remove_dropout
from isaerft_sweep.models.twin import count_parameters, small_twin
from isaerft_sweep.paths import cache_folder
from isaerft_sweep.preferences import PROGRESS
from isaerft_sweep.spec_fields import canonical_json, from_mapping, to_dict
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.attach import isaerft_config
from isaerft_sweep.trial.data import Pairs, Progress, largest_token, load_pairs, longest_sequence
from isaerft_sweep.trial.exact import PLAIN, find_exact
from isaerft_sweep.trial.harm import read_neutral
from isaerft_sweep.trial.optimizers import OPTIMIZERS
from isaerft_sweep.trial.prompted_pairs import prompted_pairs

SMALL = 5e8
"""Up to this many parameters, a model without a usable small twin is loaded for the check."""

CAUSAL = 1e-3
"""Relative change of the logits that rounding explains."""

T = TypeVar("T")


def prepare(experiment: Experiment, cache: dict[str, Any] | None = None) -> dict[str, Any]:
    """A summary of model, SAEs and data. Raises IsaerftError when a trial could not run.

    ``cache``: results of earlier calls, which this call reads and extends.
    """
    cache = {} if cache is None else cache

    def once(make: Callable[[], T], *key_parts: Any) -> T:
        key = canonical_json(key_parts)
        if key not in cache:
            cache[key] = make()
        result: T = cache[key]
        return result

    model, data, max_length = experiment.model, experiment.data, experiment.orpo.max_length
    _check_packages(experiment)
    if experiment.adapter.kind != "lora":
        isaerft_config(experiment.adapter)
    if experiment.launcher.compile:
        once(_check_compiler, "compiler")
    model_key = (to_dict(model), experiment.cache)
    config = once(lambda: load_config(model, experiment.cache), "config", *model_key)
    text = config.get_text_config()
    saes = []
    for index, hook_point in enumerate(to_dict(s) for s in experiment.adapter.sites):
        if experiment.adapter.kind not in ON_SAE:
            check_fits(stream_basis(text.hidden_size), hook_point, text.hidden_size, text.num_hidden_layers)
            _check_layers_above(experiment, hook_point["layer"], text.num_hidden_layers)
            continue
        sae = once(lambda hook_point=hook_point: load_sae(hook_point), "sae", hook_point)  # type: ignore[misc]
        check_fits(sae, hook_point, text.hidden_size, text.num_hidden_layers)
        if not experiment.adapter.force_hook:
            check_hook(sae, hook_point, model.name, index)
        saes.append(_describe_sae(hook_point, sae))
    layers = [hook_point.layer for hook_point in experiment.adapter.sites]
    step_checked = once(lambda: _check_step(experiment, config, layers), "step", *model_key, layers)
    tokenizer = once(lambda: load_tokenizer(model, experiment.cache), "tokenizer", *model_key)
    tokenizer = _checked_tokenizer(experiment, tokenizer)
    report, token_cache = Progress(sys.stderr, PROGRESS), cache_folder(experiment.cache) / "pairs"
    pairs = once(
        lambda: load_pairs(data, tokenizer, max_length, report, token_cache), "pairs", *model_key, to_dict(data), max_length
    )
    _check_tokens(experiment, config, tokenizer, pairs)
    if experiment.adapter.system_prompt:
        _check_system_prompt(experiment, config, tokenizer, pairs)
    neutral_key = ("neutral", *model_key, data.neutral_path, max_length)
    once(lambda: read_neutral(data.neutral_path, tokenizer, max_length), *neutral_key)
    name = f"{model.name} with random weights" if model.source == "random" else model.name
    return {
        "model": f"{name}: {text.num_hidden_layers} layers, hidden size {text.hidden_size}"
        + ("" if step_checked else "; too large for a trial step here, so the first trial checks it"),
        "saes": saes,
        "data": f"{data.path or data.name}: {pairs.summary}",
        "pairs": len(pairs.train),
    }


def _check_layers_above(experiment: Experiment, layer: int, layers: int) -> None:
    if experiment.adapter.kind == "lora" and layer == layers - 1:
        raise ModelError(
            f"adapter.kind=lora trains the decoder layers above the hook point, but layer {layer} is the last one. Choose a "
            "lower hook point: adapter.sites."
        )


def _check_packages(experiment: Experiment) -> None:
    """Raise ConfigError unless the optimiser is known and the packages of optimiser and attention are installed."""
    optimizer, attention = experiment.orpo.optimizer, experiment.model.attention
    if optimizer not in ("auto", *OPTIMIZERS):
        raise ConfigError(f"orpo.optimizer is unknown: {optimizer}." + suggest(optimizer, OPTIMIZERS))
    needs = {
        f"orpo.optimizer={optimizer}": "bitsandbytes" if any(part in optimizer for part in ("8bit", "paged", "bnb")) else "",
        f"model.attention={attention}": "flash_attn" if attention == "flash_attention_2" else "",
    }
    for option, package in needs.items():
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{option} needs the package {package.replace('_', '-')}, which is not installed here: pip install "
                f"{package.replace('_', '-')}, or leave the option out."
            )


def _check_compiler() -> None:
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception as error:  # backends raise different types
        raise ConfigError(
            "launcher.compile=true needs a compiler that torch.compile can use (g++ on a processor, Triton on a GPU), but "
            f"a first function could not be compiled: {(str(error) or repr(error)).splitlines()[0]} Install one, or leave "
            "launcher.compile=false."
        ) from error


def _checked_tokenizer(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.eos_token_id is None:
        name = experiment.model.tokenizer or experiment.model.name
        raise ModelError(
            f"the tokenizer must have an end-of-sequence token, which follows every answer, but that of '{name}' "
            "has none. Choose another one: model.tokenizer=NAME, or set eos_token in its tokenizer_config.json."
        )
    return tokenizer


def _check_tokens(experiment: Experiment, config: Any, tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> None:
    """Raise ModelError unless the model has an embedding for every token and supports every position."""
    text = config.get_text_config()
    largest = max(largest_token(pairs), tokenizer.pad_token_id or 0)
    if largest >= text.vocab_size:
        name = experiment.model.tokenizer or experiment.model.name
        raise ModelError(
            f"the tokenizer must go with the model, whose {text.vocab_size} embeddings are for ids up to "
            f"{text.vocab_size - 1}, but that of '{name}' ({len(tokenizer)} tokens) gives {largest}. "
            "Choose the model's own: model.tokenizer=null."
        )
    max_length = f"orpo.max_length={experiment.orpo.max_length}"
    _check_positions(config, longest_sequence(pairs), f"pair has {{}} tokens ({max_length})")


def _check_positions(config: Any, longest: int, text: str) -> None:
    """Raise ModelError unless the model supports a sequence of ``longest`` tokens."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    twin = small_twin(config) if isinstance(positions, int) and longest > positions else None
    if twin is not None:
        ids = torch.zeros(1, longest, dtype=torch.long)
        try:
            with torch.no_grad():
                twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception as error:  # a table of position embeddings that is too short
            raise ModelError(
                f"orpo.max_length must be at most {positions} for this model, which has no later positions, but the longest "
                f"{text.format(longest)}."
            ) from error


def _check_system_prompt(experiment: Experiment, config: Any, tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> None:
    """Raise IsaerftError unless the prompt can stand before every held-out pair."""
    prompt = SystemPrompt(tokenizer, experiment.adapter.system_prompt or "")
    evaluation, test = (prompted_pairs(rows, prompt) for rows in (pairs.evaluation, pairs.test))
    longest = longest_sequence(replace(pairs, evaluation=evaluation, test=test))
    _check_positions(config, longest, "held-out pair has {} tokens with adapter.system_prompt")


def _check_step(experiment: Experiment, config: Any, layers: list[int]) -> bool:
    """Raise ModelError unless a training step with an adapter works on a small twin of the model, or the model itself.

    Returns False, without a check, when the model has no twin and is too large to load.
    """
    twin = small_twin(config)
    if twin is not None:
        try:
            _step(twin, layers)
            return True
        except ModelError:  # perhaps only because of the twin's sizes
            if count_parameters(config) > SMALL:
                raise
    if count_parameters(config) > SMALL:
        return False
    _step(load(experiment.model, experiment.cache).model, layers)
    return True


def _step(model: PreTrainedModel, layers: list[int]) -> None:
    remove_dropout(model)  # as a trial does
    _check_causal(model)
    width = model.get_input_embeddings().weight.shape[-1]
    sites = [{"layer": layer, "sae_release": OWN_RELEASE, "sae_id": f"random-{width}x{2 * width}"} for layer in layers]
    find_exact(model, sites, PLAIN)


@torch.no_grad()
def _check_causal(model: PreTrainedModel) -> None:
    """Raise ModelError if a token's logits depend on a later token, as in a model for filling in masks."""
    ids = torch.arange(1, 9)[None]
    other = ids.clone()
    other[0, -1] = 9
    was_training, kind = model.training, type(model).__name__
    model.eval()
    with suppress(ValueError, TypeError, RuntimeError, IndexError, NotImplementedError):  # the step says what is wrong
        one, two = (model(input_ids=i, attention_mask=torch.ones_like(i)).logits[0, :4] for i in (ids, other))
        if (one - two).abs().max() > CAUSAL * one.abs().max():
            raise ModelError(
                f"the model must be causal, so that a token sees only earlier ones, but in {kind} later ones change its "
                "logits (is_decoder in its config?). Choose a decoder-only language model."
            )
    model.train(was_training)


def _describe_sae(hook_point: dict[str, Any], sae: FrozenSae) -> str:
    description = f"layer {hook_point['layer']}, {sae.d_sae} latents ({describe(hook_point)})"
    quality = sae.sae.cfg.metadata.get("quality")
    if quality:
        description += f", variance explained {1 - quality['fvu']:.2f}, L0 {quality['l0']:.0f}"
    return description


def main() -> int:
    """Read the experiments from standard input; write the result as the last line of standard output."""
    cache: dict[str, Any] = {}
    try:
        summaries = [prepare(from_mapping(Experiment, raw, ""), cache) for raw in json.load(sys.stdin)]
        answer: dict[str, Any] = {"ok": {**summaries[0], "more": len(summaries) - 1}}
    except IsaerftError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
    return 0
