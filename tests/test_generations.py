"""What an evaluation measures of greedy answers, against a plain loop over all logits of the saved adapter and the plain model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from helpers.trials import LEVELS, OFF, Made, assert_near, rows_of, run_together

from isaerft_sweep.adapter.load import load_model
from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.journal.worker_queue import WorkerFolder
from isaerft_sweep.metrics import GENERATION
from isaerft_sweep.models.loading import load, load_tokenizer
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.generations import MAX_NEW_TOKENS, held_out_prompts, measure_generations
from isaerft_sweep.trial.runner import run_trial

PROMPTS = 3


@torch.no_grad()
def by_hand(folder: Any) -> dict[str, float]:
    """The most likely token after each prefix, one whole forward pass per token, without a cache."""
    experiment = folder.read_spec().experiment
    base = load(experiment.model, None).model.eval()
    adapted = load_model(folder.adapter)[0].eval()
    pairs = load_pairs(experiment.data, load_tokenizer(experiment.model, None), experiment.orpo.max_length).evaluation
    prompts: list[list[int]] = []
    for row in pairs:
        prompt = row["chosen_ids"][: row["chosen_prompt_length"]]
        if prompt not in prompts:
            prompts.append(prompt)
    lengths, losses, grams, repeated, bigrams = [], [], 0, 0, []
    for prompt in prompts[:PROMPTS]:
        answer: list[int] = []
        while len(answer) < MAX_NEW_TOKENS and answer[-1:] != [base.generation_config.eos_token_id]:
            answer.append(int(adapted(torch.tensor([prompt + answer]), use_cache=False).logits[0, -1].argmax()))
        logps = base(torch.tensor([prompt + answer]), use_cache=False).logits[0].double().log_softmax(-1)
        losses += [-float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]
        counts = Counter(tuple(answer[i : i + 4]) for i in range(len(answer) - 3))
        grams, repeated = grams + counts.total(), repeated + counts.total() - len(counts)
        bigrams += [tuple(answer[i : i + 2]) for i in range(len(answer) - 1)]
        lengths.append(len(answer))
    return {
        "eval/generation_tokens": sum(lengths) / len(lengths),
        "eval/generation_repeated": repeated / grams,
        "eval/generation_distinct2": len(set(bigrams)) / len(bigrams),
        "eval/generation_base_nll": sum(losses) / len(losses),
    }


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_what_a_plain_loop_says(level: str, trial: Made) -> None:
    stored, lean = LEVELS[level]
    options = (f"launcher.activation_cache_gb={stored}", f"launcher.lean_logits={lean}", "orpo.learning_rate=0.5")
    folder = trial(*OFF, *options, f"orpo.eval_generations={PROMPTS}", "orpo.warmup_steps=0", "orpo.eval_untrained=always")
    assert run_trial(folder, 1) == "completed", folder.read_status()
    rows = [row for row in rows_of(folder) if "eval/generation_tokens" in row]
    assert len(rows) == 2, "at every evaluation"
    expected = by_hand(folder)
    assert set(expected) == set(GENERATION)
    for name, value in expected.items():
        assert rows[-1][name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    card = folder.card.read_text()
    assert all(f"| {name} |" in card for name in GENERATION)


def test_it_changes_no_other_number(trial: Made) -> None:
    measured, left_out = trial(*OFF, "orpo.eval_generations=2", name="measured"), trial(*OFF, name="left-out")
    assert run_trial(measured, 1) == run_trial(left_out, 1) == "completed"
    for row, same in zip(rows_of(measured), rows_of(left_out), strict=True):
        assert {name: value for name, value in row.items() if name not in GENERATION} == same


class _Repeats:
    """A model that answers [7, 8] again and again, then stops."""

    def __init__(self, answer: list[int]) -> None:
        self.answer, self.device = answer, torch.device("cpu")

    def generate(self, input_ids: torch.Tensor, **_options: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([self.answer], dtype=torch.long)], dim=1)

    def disable_adapter(self) -> Any:
        return torch.no_grad()

    def __call__(self, input_ids: torch.Tensor, **_options: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 16)
        return type("Output", (), {"logits": logits})


def test_repetition_and_answers_of_no_token() -> None:
    values = measure_generations(_Repeats([7, 8, 7, 8, 7, 8, 7]), [[1, 2], [3]], 0, None)  # type: ignore[arg-type]
    # 4-grams 7878, 8787, 7878, 8787: two of four came before; two different bigrams of 12
    expected = {"tokens": 7.0, "repeated": 0.5, "distinct2": 2 / 12, "base_nll": 2.772588722}
    assert values == pytest.approx({f"generation_{name}": value for name, value in expected.items()})
    assert measure_generations(_Repeats([]), [[1]], 0, None) == {"generation_tokens": 0.0}  # type: ignore[arg-type]


def test_each_prompt_once() -> None:
    from datasets import Dataset

    rows = {"chosen_ids": [[1, 2, 3], [1, 2, 4], [5, 6], [9, 9]], "chosen_prompt_length": [2, 2, 1, 0]}
    pairs = Dataset.from_dict(rows)
    assert held_out_prompts(pairs, 8) == [[1, 2], [5]] and held_out_prompts(pairs, 1) == [[1, 2]]


def test_a_sweep_may_rank_by_it_only_when_it_is_measured(experiment: Any, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "method: grid\nmetric: {name: eval/generation_base_nll, goal: minimize}\nparameters: {orpo.beta: {values: [1]}}\n"
    )
    composed = experiment(*TINY, "sweep=none", f"sweep.file={file}")
    with pytest.raises(ConfigError, match=r"orpo.eval_generations must be above 0 but is 0: the sweep file names eval/gen"):
        to_definition(composed.sweep, composed)
    composed = experiment(*TINY, "sweep=none", f"sweep.file={file}", "orpo.eval_generations=2")
    assert to_definition(composed.sweep, composed).metric.name == "eval/generation_base_nll"


@pytest.mark.slow
def test_co_batched_trials_answer_as_trials_alone(trial: Made, tmp_path: Path) -> None:
    settings = [("orpo.beta=2.0",), ("orpo.beta=0.1", "adapter=scale", "orpo.eval_untrained=always")]
    shared = (*OFF, "orpo.eval_generations=2", "launcher.activation_cache_gb=1", "orpo.learning_rate=0.1")
    alone, together = ([trial(*shared, *own, name=f"{kind}{i}") for i, own in enumerate(settings)] for kind in "ab")
    assert all(run_trial(one, 1) == "completed" for one in alone)
    sizes: list[int] = []
    assert run_together(WorkerFolder(tmp_path / "worker"), together, 2, sizes) == 2 and 2 in sizes
    for mine, expected in zip(together, alone, strict=True):
        assert "eval/generation_base_nll" in rows_of(mine)[-1]
        assert_near(mine, expected)
