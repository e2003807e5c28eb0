"""One attempt of one trial, from spec to adapter."""

from __future__ import annotations

import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.system_prompt import SystemPrompt
from isaerft_sweep.errors import IsaerftError, TrialDiverged, disk_failure
from isaerft_sweep.journal.atomic_files import make_readable, write_json
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.journal.status_writer import StatusWriter, Superseded
from isaerft_sweep.models.loading import LoadedModel, compile_layers, load, sharing_weights, without_dropout
from isaerft_sweep.paths import cache_folder
from isaerft_sweep.provenance import describe_environment
from isaerft_sweep.results.card.model_card import make_card, write_card
from isaerft_sweep.spec_fields import canonical_json, to_dict
from isaerft_sweep.specs import Experiment, TrialSpec
from isaerft_sweep.tracking.wandb_run import open_run, summary_of
from isaerft_sweep.trial import phases as phase
from isaerft_sweep.trial.attach import attach_adapter
from isaerft_sweep.trial.checkpoints import complete_checkpoints, step_of
from isaerft_sweep.trial.cobatch.passes import Steps
from isaerft_sweep.trial.cobatch.run_passes import run_alone
from isaerft_sweep.trial.data import Pairs, load_pairs
from isaerft_sweep.trial.difference_of_means import set_difference_of_means
from isaerft_sweep.trial.forward.activation_cache import lowest_hook_point, sequences_of
from isaerft_sweep.trial.forward.strategy import ForwardStrategy
from isaerft_sweep.trial.generations import held_out_prompts, measure_generations
from isaerft_sweep.trial.gradient_record import make_record
from isaerft_sweep.trial.harm import HarmProbe, measure_baseline, measure_harm, read_neutral
from isaerft_sweep.trial.latent_statistics import learned, write_changes
from isaerft_sweep.trial.phases import Phases
from isaerft_sweep.trial.process_cache import ProcessCache, cached_activations, data_key, exact_optimizations, reference_key
from isaerft_sweep.trial.prompted_pairs import prompted_pairs, prompted_texts
from isaerft_sweep.trial.recorder import Recorder
from isaerft_sweep.trial.reference import compute_reference
from isaerft_sweep.trial.sparsity import make_sparsity
from isaerft_sweep.trial.stop_request import StopFlags, StopRequested, requested_state, stop_requests
from isaerft_sweep.trial.train_loop import HeldOut, PassContext, TrainLoop


def run_trial(
    folder: TrialFolder, attempt: int, shared: ProcessCache | None = None, flags: StopFlags | None = None
) -> TrialState:
    """Run or resume the trial in ``folder`` by itself. Arguments and result as ``trial_steps``."""
    return run_alone(trial_steps(folder, attempt, shared, flags))


def trial_steps(
    folder: TrialFolder, attempt: int, shared: ProcessCache | None = None, flags: StopFlags | None = None
) -> Steps[TrialState]:
    """One attempt, as a generator that yields the passes that it needs; returns its state, which is also in its status file.

    Args:
        folder: the trial's.
        attempt: the attempt's number.
        shared: what earlier trials of this process have loaded.
        flags: set by the caller's own ``stop_requests``; None: this one listens itself.

    The state is ``failed`` when an error ended it (the message is in the status), ``diverged`` when the loss did,
    ``stopped`` when a signal or the controller asked for it and a checkpoint lets it resume, ``pruned`` when the sweep
    stopped it early. Raises Superseded when a newer attempt has begun.
    """
    spec = folder.read_spec()
    status = StatusWriter(folder, attempt)
    status.write(TrialState.RUNNING, step=0)
    shared = shared or ProcessCache()
    try:
        with stop_requests() if flags is None else nullcontext(flags) as heard:
            return (yield from _run(spec, Phases(status, heard), shared))
    except Superseded:
        raise
    except StopRequested:
        print("ended before the first step", flush=True)
        return _end(status, TrialState.STOPPED, **_cut_off(shared, complete_checkpoints(folder.checkpoints)))
    except IsaerftError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _end(status, TrialState.FAILED, message=str(error), user_error=True)
    except Exception as error:
        if refused := disk_failure(error, folder.path):
            print(f"error: {refused}", file=sys.stderr, flush=True)
            return _end(status, TrialState.FAILED, message=refused)
        traceback.print_exc()
        return _end(status, TrialState.FAILED, message=f"{type(error).__name__}: {error}"[:2000])


def _run(spec: TrialSpec, phases: Phases, shared: ProcessCache) -> Steps[TrialState]:
    experiment = spec.experiment
    key = canonical_json([to_dict(experiment.model), experiment.cache])
    loaded = phases.prepared(
        phase.LOADING,
        lambda: shared.get("model", key, lambda: without_dropout(load(experiment.model, experiment.cache))),
    )
    # on a copy over the same weights: whatever becomes of this trial, the next one finds the model as it was loaded
    own = replace(loaded, model=sharing_weights(loaded.model))
    model = phases.prepared(
        phase.ADAPTER,
        lambda: attach_adapter(own, experiment.adapter, experiment.orpo.seed, experiment.model.revision),
    )
    if experiment.launcher.compile:
        layers = decoder_layers(own.model)
        compile_layers(layers[lowest_hook_point(layers) :])
    return (yield from _train(spec, phases, shared, loaded, model))


def _train(
    spec: TrialSpec, phases: Phases, shared: ProcessCache, loaded: LoadedModel, model: peft.PeftModel
) -> Steps[TrialState]:
    started = time.monotonic()
    experiment, status, folder = spec.experiment, phases.status, phases.status.folder
    pairs = phases.prepared(
        phase.READING,
        lambda: shared.get("pairs", data_key(experiment), lambda: load_pairs(*_pairs_of(experiment, loaded))),
    )
    print(pairs.summary, flush=True)
    data, orpo = experiment.data, experiment.orpo
    neutral = read_neutral(data.neutral_path, loaded.tokenizer, orpo.max_length) if orpo.eval_harm else []
    write_json(folder.environment, describe_environment(torch_device=_device_name()))
    run = open_run(spec, folder.path / "wandb")
    recorder = Recorder(spec, status, run, lambda: requested_state(phases.flags, run.can_receive_stop))
    checkpoints = complete_checkpoints(folder.checkpoints)
    cut_off = False
    try:
        yield from _steps(spec, phases, shared, _Loaded(model, loaded, pairs, neutral), recorder)
        phases.enter(phase.LATENTS)
        changes = [] if recorder.stopped else learned(model, pairs.evaluation)
    except StopRequested:
        cut_off = True
        recorder.cut_off(requested_state(phases.flags, run.can_receive_stop) or TrialState.STOPPED)
    except TrialDiverged as error:
        print(f"diverged: {error}", flush=True)
        run.finish({"state": TrialState.DIVERGED}, exit_code=1)
        return _end(status, TrialState.DIVERGED, message=str(error), **_results(recorder, started))
    except BaseException:
        run.finish({"state": TrialState.FAILED}, exit_code=1)
        raise
    early = recorder.stopped is TrialState.PRUNED
    message = "stopped early; its checkpoint is kept" if early else "asked to stop; a checkpoint was written"
    fields = _cut_off(shared, checkpoints) if cut_off else {"message": message}
    if early:
        results = _results(recorder, started)
        run.finish(summary_of(TrialStatus(state=TrialState.PRUNED, **results)), exit_code=0)
        return _end(status, TrialState.PRUNED, **fields, **results)
    if recorder.stopped:
        # first this: whoever asked may not wait until W&B has answered
        _end(status, TrialState.STOPPED, **fields, wandb_not_notified=True)
        run.finish({"state": TrialState.STOPPED}, exit_code=1, preempted=True)
        return _end(status, TrialState.STOPPED, **fields, wandb_not_notified=run.lost)
    phases.enter(phase.SAVING)
    write_changes(folder.latents, changes)
    results = _results(recorder, started)
    results["pairs"] = pairs.counts
    results["wandb"] = {"url": run.url, "sweep_url": run.sweep_url, "offline": run.offline_folder is not None}
    final = TrialStatus(state=TrialState.COMPLETED, **results)
    _save(folder, model, loaded, final, status)
    run.log_adapter(folder.adapter, spec.model_name)
    state = _end(status, TrialState.COMPLETED, **results)
    run.finish(summary_of(final), exit_code=0)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # only now: until the status says so, a retry would need them
    return state


@dataclass(frozen=True)
class _Loaded:
    """What a trial trains with."""

    model: peft.PeftModel
    base: LoadedModel
    pairs: Pairs
    neutral: list[list[int]]
    """Token ids of text that has nothing to do with the pairs; empty without ``orpo.eval_harm``."""
    neutral_start: int = 0
    """Tokens at the start of each such text that are not its own."""

    def harm_probe(self, batch_size: int) -> HarmProbe:
        pad = int(self.base.tokenizer.pad_token_id)
        return HarmProbe(self.pairs.evaluation, self.neutral, pad, batch_size, self.neutral_start)

    def behind(self, prompt: SystemPrompt) -> _Loaded:
        """The same with the system prompt before all that evaluations read."""
        evaluation, test = (prompted_pairs(rows, prompt) for rows in (self.pairs.evaluation, self.pairs.test))
        neutral, start = prompted_texts(self.neutral, prompt)
        pairs = replace(self.pairs, evaluation=evaluation, test=test)
        return replace(self, pairs=pairs, neutral=neutral, neutral_start=start)


def _steps(spec: TrialSpec, phases: Phases, shared: ProcessCache, loaded: _Loaded, recorder: Recorder) -> Steps[None]:
    """From tokenised pairs to the last step, or to the one after which the recorder stops."""
    experiment, checkpoints = spec.experiment, phases.status.folder.checkpoints
    model, orpo = loaded.model, experiment.orpo
    pad = int(loaded.base.tokenizer.pad_token_id)
    loop = TrainLoop(orpo, model, loaded.pairs, pad, recorder, checkpoints)
    optimizations = phases.prepared(phase.FROZEN, lambda: exact_optimizations(experiment, loaded.base, shared))
    resume = next(reversed(complete_checkpoints(checkpoints)), None)
    recorder.rewind(step_of(resume) if resume else -1)
    evaluate_first = {"first": spec.index == 0, "always": True, "never": False}[orpo.eval_untrained] and resume is None
    kind, system = experiment.adapter.kind, experiment.adapter.system_prompt
    prompt = SystemPrompt(loaded.base.tokenizer, system) if kind == "prompt" and system else None
    after = loaded.behind(prompt) if prompt else loaded
    texts = loop.texts(loaded.neutral, trains=prompt is None)
    texts += sequences_of(after.pairs.evaluation, after.pairs.test) + after.neutral if prompt else []
    with cached_activations(texts, experiment, model, optimizations, shared, phases) as above:
        can_be_co_batched = optimizations.cached_activations and optimizations.lean_logits and kind != "lora"
        base = loaded.base.model if can_be_co_batched else None
        strategy = ForwardStrategy(above, optimizations.share_prompts, optimizations.lean_logits, base)
        key = reference_key(experiment, strategy)
        reference, baseline = None, None
        if loop.loss.needs_reference:
            data = [loop.reached_rows(), loaded.pairs.evaluation, loaded.pairs.test]
            reference = phases.prepared(
                phase.REFERENCE,
                lambda: shared.get(
                    "reference", key, lambda: compute_reference(model, data, strategy, pad, orpo.eval_batch_size)
                ),
            )
        if orpo.eval_harm:
            probe = loaded.harm_probe(orpo.eval_batch_size)
            baseline = phases.prepared(
                phase.REFERENCE, lambda: shared.get("baseline", key, lambda: measure_baseline(model, probe, strategy))
            )

        def held_out(read: _Loaded) -> HeldOut:
            measures: list[Callable[[], dict[str, float]]] = []
            if baseline is not None:
                measures.append(partial(measure_harm, model, read.harm_probe(orpo.eval_batch_size), strategy, baseline))
            if orpo.eval_generations:
                prompts, plain = (held_out_prompts(one.pairs.evaluation, orpo.eval_generations) for one in (read, loaded))
                measures.append(partial(measure_generations, model, prompts, pad, above, plain))
            return HeldOut(read.pairs.evaluation, read.pairs.test, tuple(measures))

        fit: Callable[[], None] | None = None
        if kind == "diffmean":
            rows, strength = loop.reached_rows(), experiment.adapter.strength
            fit = partial(set_difference_of_means, model, rows, strength, above, pad, orpo.eval_batch_size)
        elif prompt:
            fit = _nothing
        record = make_record(experiment, model, loop.steps, phases.status.folder.gradients)
        context = PassContext(strategy, held_out(after), held_out(loaded) if prompt else None, reference, fit, record)
        yield from loop.run(context, make_sparsity(experiment.adapter), resume, evaluate_first)


def _nothing() -> None:
    """The fit of an adapter that stays as it is."""


def _cut_off(shared: ProcessCache, checkpoints: list[Path]) -> dict[str, Any]:
    """What is to be said of a trial that was stopped where no checkpoint could be written.

    That is no fault of its own when its worker has run others before: it has not begun.
    """
    then = "it resumes from its last checkpoint" if checkpoints else "it had no step to keep"
    return {"message": f"asked to stop; {then}", **({"begun": False} if shared.served else {})}


def _pairs_of(experiment: Experiment, loaded: LoadedModel) -> tuple[Any, ...]:
    """What ``load_pairs`` is asked for."""
    return experiment.data, loaded.tokenizer, experiment.orpo.max_length, None, cache_folder(experiment.cache) / "pairs"


def _results(recorder: Recorder, started: float) -> dict[str, Any]:
    return {
        "metric": recorder.latest.get(recorder.metric),
        "metrics": recorder.latest,
        "untrained": recorder.untrained,
        "seconds": round(time.monotonic() - started, 3),
    }


def _end(status: StatusWriter, state: TrialState, **changes: Any) -> TrialState:
    status.write(state, **changes, ended=time.time())
    return state


def _save(
    folder: TrialFolder, model: peft.PeftModel, loaded: LoadedModel, results: TrialStatus, status: StatusWriter
) -> None:
    """Write the adapter folder aside and rename it: it is there whole or not at all."""
    aside = folder.unfinished_adapter(status.attempt)
    shutil.rmtree(aside, ignore_errors=True)
    # the embeddings are frozen; asked to look, PEFT would search the Hub for the base model's vocabulary
    model.save_pretrained(aside, save_embedding_layers=False)
    loaded.tokenizer.save_pretrained(aside)
    write_card(folder, aside, make_card(folder, results, aside))
    make_readable(aside)
    status.check()
    shutil.rmtree(folder.adapter, ignore_errors=True)
    os.replace(aside, folder.adapter)


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({torch.get_num_threads()} threads)"
