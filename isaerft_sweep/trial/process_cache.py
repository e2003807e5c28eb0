"""What the trials of a sweep have in common, so that it is loaded or computed once: model, pairs, tokens, frozen layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import peft

from isaerft_sweep.adapter.config import ON_SAE
from isaerft_sweep.models.loading import LoadedModel
from isaerft_sweep.paths import cache_folder
from isaerft_sweep.spec_fields import canonical_json, to_dict
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.attach import hook_layer
from isaerft_sweep.trial.exact import Optimizations, find_exact
from isaerft_sweep.trial.forward.activation_cache import CachePlace, NotStored, StoredActivations, stored_activations
from isaerft_sweep.trial.forward.strategy import ForwardStrategy, why_not_shared
from isaerft_sweep.trial.forward.upper_layers import UpperLayers
from isaerft_sweep.trial.phases import FROZEN, Phases

T = TypeVar("T")


class ProcessCache:
    """What the trials of one process have in common. This one keeps nothing: for a process of a single trial."""

    served = 0
    """How many trials the process has run before."""

    def get(self, what: str, key: str, make: Callable[[], T]) -> T:
        """What ``make`` returns; a resident worker caches it under ``what`` and ``key`` for its next trials."""
        return make()


def data_key(experiment: Experiment) -> str:
    """Equal for experiments that read the same pairs as the same tokens."""
    sections = [to_dict(experiment.model), experiment.cache, to_dict(experiment.data), experiment.orpo.max_length]
    return canonical_json(sections)


def activations_key(experiment: Experiment) -> str:
    """Equal for experiments that can use the same stored output of the frozen layers."""
    launcher, lowest = experiment.launcher, hook_layer(experiment.adapter)
    settings = [launcher.scratch, launcher.activation_cache_gb, launcher.share_prompts, experiment.orpo.eval_harm]
    return canonical_json([data_key(experiment), lowest, *settings])


def reference_key(experiment: Experiment, strategy: ForwardStrategy) -> str:
    """Equal for experiments whose reference log-probabilities are the same numbers."""
    orpo = experiment.orpo
    reached = [orpo.seed, orpo.batch_size, orpo.gradient_accumulation, orpo.max_steps, orpo.epochs, orpo.eval_batch_size]
    return canonical_json([activations_key(experiment), reached, strategy.share_prompts, strategy.lean])


@contextmanager
def cached_activations(
    sequences: list[list[int]],
    experiment: Experiment,
    model: peft.PeftModel,
    optimizations: Optimizations,
    shared: ProcessCache,
    phases: Phases,
) -> Iterator[UpperLayers | None]:
    """The frozen layers below the hook point, run once per sweep and node, where their output fits the cache.

    The cache stores what the first trial reads: every pair, or only those that its few steps reach. Later trials compute
    anything else.

    Args:
        sequences: token ids of what the trial reads.
        experiment: where the cache is, and how large it may be.
        model: with the trial's adapter.
        optimizations: those that are exact for the model.
        shared: what this process has loaded.
        phases: of the trial, which wait for another process that fills the cache.
    """
    if experiment.launcher.activation_cache_gb == 0 or not optimizations.cached_activations:
        yield None
        return

    def compute() -> StoredActivations | None:
        started = time.monotonic()
        stored = store_activations(sequences, experiment, model, optimizations, phases.tell)
        if stored is not None:
            print(
                f"frozen layers' output of {len(stored.values)} tokens ready after {time.monotonic() - started:.1f} s",
                flush=True,
            )
        return stored

    stored = phases.prepared(FROZEN, lambda: shared.get("activations", activations_key(experiment), compute))
    if stored is None:
        yield None
        return
    with UpperLayers(model, stored).replaced() as above:
        yield above


def store_activations(
    sequences: list[list[int]],
    experiment: Experiment,
    model: peft.PeftModel,
    optimizations: Optimizations,
    tell: Callable[[float], None] = lambda _share: None,
) -> StoredActivations | None:
    """The frozen layers' output, computed and stored where the cache lacks it; None where it cannot be stored.

    Args:
        sequences: token ids of what is read.
        experiment: where the cache is, and how large it may be.
        model: with an adapter.
        optimizations: those that are exact for the model.
        tell: called with the share that is done.
    """
    limit_gb, scratch = experiment.launcher.activation_cache_gb, experiment.launcher.scratch
    if limit_gb == 0 or not optimizations.cached_activations:
        return None
    folder = Path(scratch).expanduser() if scratch else cache_folder(experiment.cache) / "trunk"
    try:
        return stored_activations(
            model, experiment.model, sequences, CachePlace(folder, limit_gb), optimizations.share_prompts, tell
        )
    except NotStored as reason:
        print(f"the frozen layers are computed in every step: {reason}", flush=True)
        return None


def exact_optimizations(experiment: Experiment, loaded: LoadedModel, shared: ProcessCache) -> Optimizations:
    """Which savings give this model's own numbers, of those that the launcher wants."""
    launcher, kind = experiment.launcher, experiment.adapter.kind
    sites = [to_dict(site) if kind in ON_SAE else {"layer": site.layer} for site in experiment.adapter.sites]

    def ask() -> Optimizations:
        share = launcher.share_prompts and launcher.lean_logits
        why_not = why_not_shared(loaded.model) if share else None
        if why_not:
            print(f"each answer is computed with its own copy of the prompt: {why_not}", flush=True)
        wanted = Optimizations(
            cached_activations=True, share_prompts=share and not why_not, lean_logits=launcher.lean_logits
        )
        found, reason = find_exact(loaded.model, sites, wanted)
        consequences = {
            "cached_activations": "the frozen layers are computed in every step",
            "share_prompts": "each answer is computed with its own copy of the prompt",
            "lean_logits": "the model's own forward pass runs, with all logits",
        }
        for name, consequence in consequences.items():
            if getattr(wanted, name) and not getattr(found, name):
                print(f"{consequence}: {reason}", flush=True)
        return found

    settings = [to_dict(experiment.model), experiment.cache, launcher.share_prompts, launcher.lean_logits, sites]
    return shared.get("optimizations", canonical_json(settings), ask)
