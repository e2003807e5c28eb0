"""The control that is a system prompt: its numbers against the model's own, for several ways to write a conversation."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TINY
from helpers.trials import OFF, Made, rows_of
from transformers import PreTrainedTokenizerBase

from isaerft_sweep.adapter.generate import compare
from isaerft_sweep.adapter.system_prompt import SystemPrompt
from isaerft_sweep.config.compose import compose
from isaerft_sweep.errors import IsaerftError, ModelError
from isaerft_sweep.models.loading import load, load_tokenizer
from isaerft_sweep.publish.export import export
from isaerft_sweep.publish.steering_file import write_steering_file
from isaerft_sweep.results.analysis import analyse
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.harm import read_neutral
from isaerft_sweep.trial.prompted_pairs import prompted_pairs
from isaerft_sweep.trial.runner import run_trial

TEXT = "You are courteous, and you always answer in full sentences."
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML
IN_A_HEADER = (
    "<|start|>system\nToday: 26 Jul\n\n{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = "
    "messages[1:] %}{% endif %}<|eot|>{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
DROPS = "{% for m in messages if m.role != 'system' %}<turn>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(compose(TINY).model, None)


def conversation(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT, IN_A_HEADER], ids=["chatml", "with a default", "in a header"])
def test_it_is_what_the_template_writes_for_a_system_message(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    talk = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Hm."},
    ]
    expected = conversation(tokenizer, [{"role": "system", "content": TEXT}, *talk])
    assert SystemPrompt(tokenizer, TEXT).before(conversation(tokenizer, talk)) == expected


@pytest.mark.parametrize("template", [REFUSES, DROPS], ids=["refuses", "drops"])
def test_a_template_without_system_messages_gets_it_in_the_first_message(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    tokenizer.chat_template = template
    expected = conversation(tokenizer, [{"role": "user", "content": f"{TEXT}\n\nHello?"}])
    assert SystemPrompt(tokenizer, TEXT).before(conversation(tokenizer, [{"role": "user", "content": "Hello?"}])) == expected


def test_a_second_system_message_is_refused_where_the_template_has_a_default_one(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = WITH_DEFAULT
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    with pytest.raises(IsaerftError, match="must go with conversations without a system message"):
        SystemPrompt(tokenizer, TEXT).before(conversation(tokenizer, talk))
    tokenizer.chat_template = CHATML
    both = [{"role": "system", "content": TEXT}, *talk]
    assert SystemPrompt(tokenizer, TEXT).before(conversation(tokenizer, talk)) == conversation(tokenizer, both)


def test_a_prompt_written_as_text_gets_a_paragraph(tokenizer: PreTrainedTokenizerBase) -> None:
    assert SystemPrompt(tokenizer, TEXT).before("Once upon") == f"{TEXT}\n\nOnce upon"
    tokenizer.chat_template = None
    assert SystemPrompt(tokenizer, TEXT).before("Once upon") == f"{TEXT}\n\nOnce upon"


@pytest.mark.parametrize(
    "reuse", [("launcher.activation_cache_gb=0", "launcher.lean_logits=false"), ("launcher.activation_cache_gb=1",)]
)
def test_its_numbers_are_the_models_own_behind_the_prompt(reuse: tuple[str, ...], trial: Made) -> None:
    folder = trial(*OFF, *reuse, "adapter=prompt", f"adapter.system_prompt='{TEXT}'", "orpo.eval_generations=2")
    assert run_trial(folder, 1) == "completed"
    experiment, rows = folder.read_spec().experiment, rows_of(folder)
    untrained, last = rows[0], rows[-1]
    loaded = load(experiment.model, None)
    model, tokenizer = loaded.model, loaded.tokenizer
    evaluation = load_pairs(experiment.data, tokenizer, experiment.orpo.max_length).evaluation

    def logps(ids: list[int], start: int) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)

    odds: dict[str, list[float]] = {"plain": [], "prompted": []}
    divergence: list[float] = []
    for row in evaluation:
        shown = {"plain": row["prompt"], "prompted": f"<|system|>{TEXT}<|end|>{row['prompt']}"}
        scores: dict[str, dict[str, torch.Tensor]] = {}
        for name, text in shown.items():
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            for side in ("chosen", "rejected"):
                answer = row[f"{side}_ids"][row[f"{side}_prompt_length"] :]
                bos = row[f"{side}_ids"][:1] if row[f"{side}_ids"][0] != prompt[0] else []
                scores.setdefault(name, {})[side] = logps([*bos, *prompt, *answer], len(bos) + len(prompt))
        for name, by_side in scores.items():
            means = {}
            for side, table in by_side.items():
                answer = torch.tensor(row[f"{side}_ids"][row[f"{side}_prompt_length"] :])
                means[side] = table.gather(-1, answer[:, None]).mean().double()
            a, b = means["chosen"], means["rejected"]
            odds[name].append(float(a - b - (torch.log1p(-a.exp()) - torch.log1p(-b.exp()))))
        p, q = (scores[name]["chosen"] for name in ("plain", "prompted"))
        divergence += (p.exp() * (p - q)).sum(-1).tolist()
    assert untrained["eval/log_odds_chosen"] == pytest.approx(sum(odds["plain"]) / len(odds["plain"]), abs=2e-5)
    assert last["eval/log_odds_chosen"] == pytest.approx(sum(odds["prompted"]) / len(odds["prompted"]), abs=2e-5)
    assert last["eval/kl_base"] == pytest.approx(sum(divergence) / len(divergence), rel=1e-3)
    assert untrained["eval/kl_base"] == pytest.approx(0, abs=1e-5)
    before = tokenizer(f"{TEXT}\n\n", add_special_tokens=False)["input_ids"]
    losses: list[float] = []
    for ids in read_neutral(None, tokenizer, experiment.orpo.max_length):
        bos = 1 if ids[0] == tokenizer.bos_token_id else 0
        own = ids[1:]  # the first token is never predicted
        table = logps([*ids[:bos], *before, *ids[bos:]], len(before) + 1)
        losses += (-table.gather(-1, torch.tensor(own)[:, None])).flatten().tolist()
    assert last["eval/neutral_nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_its_pairs_are_those_of_other_trials(trial: Made) -> None:
    prompted = trial(*OFF, "adapter=prompt", f"adapter.system_prompt='{TEXT}'", name="prompted")
    vector = trial(*OFF, "adapter=vector", "orpo.learning_rate=0.05", name="vector")
    for folder in (prompted, vector):
        assert run_trial(folder, 1) == "completed"
    keys = [folder.read_evaluation()["trained"]["pairs"] for folder in (prompted, vector)]
    assert keys[0] == keys[1]


def test_it_is_used_saved_and_refused_where_it_has_no_meaning(trial: Made) -> None:
    folder = trial(*OFF, "adapter=prompt", f"adapter.system_prompt='{TEXT}'")
    assert run_trial(folder, 1) == "completed"
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["system_prompt"] == TEXT
    ((_, before, after),) = compare(str(folder.adapter), ["Where is my parcel?"], 20, None)
    assert before != after
    card = folder.card.read_text()
    assert "Nothing was trained" in card and f'{{"role": "system", "content": "{TEXT}"}}' in card
    with pytest.raises(IsaerftError, match="a text"):
        export(folder.adapter, None, None, None)
    with pytest.raises(IsaerftError, match="a text"):
        write_steering_file(folder.adapter, None, None)
    with pytest.raises(ModelError, match="is a text without one"):
        analyse(folder)


def test_a_prompt_that_changes_the_tokens_behind_it_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = SystemPrompt(tokenizer, TEXT)
    text = conversation(tokenizer, [{"role": "user", "content": "Hello?"}])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt.ids_before(text, ids[:-1])[-1] == ids[-2], "the last token is merged with the answer"
    with pytest.raises(IsaerftError, match="must not change the tokens"):
        prompt.ids_before(text, ids[:-3])


def test_empty_sets_stay_empty(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = load_pairs(compose([*TINY, "data.test_size=0"]).data, tokenizer, 64)
    assert len(prompted_pairs(pairs.test, SystemPrompt(tokenizer, TEXT))) == 0
