"""Text that every card has: the quick start, names of blocks and frameworks, citations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

FRAMEWORKS = {
    "trl": "TRL",
    "transformers": "Transformers",
    "torch": "PyTorch",
    "datasets": "Datasets",
    "tokenizers": "Tokenizers",
    "peft": "PEFT",
    "sae-lens": "SAELens",
    "isaerft-sweep": "isaerft-sweep",
}
BLOCKS = {
    "bias": "f + b",
    "scale": "f · (1 + s)",
    "linear": "f + Wf + c",
    "mlp": "f + MLP(f)",
    "random": "f + b",
    "vector": "x + b",
    "diffmean": "x + b",
    "loreft": "x + Rᵀ(Wx + c − Rx)",
    "lora": "Wx + BAx",
    "prompt": "x",
}
ISAERFT = "an ISAERFT adapter, a small trainable block in the latent space of a frozen sparse autoencoder (SAE)"
ABOUT = {
    "random": "a bias on random directions, as many and as long as those of a sparse autoencoder: a control for ISAERFT",
    "vector": "a steering vector, trained on the residual stream without a sparse autoencoder: a control for ISAERFT",
    "diffmean": "a steering vector, the difference between the mean activations of chosen and rejected answers",
    "loreft": "a LoReFT adapter (arXiv 2404.03592) on the residual stream",
    "lora": "a LoRA adapter (arXiv 2106.09685) on the decoder layers above the hook point",
    "prompt": "a system prompt, with the model as it is: a control for ISAERFT",
}
"""What the adapter is, for kinds other than ISAERFT's."""
QUICK_START = """\
In the folder of this card, or with its Hub name instead of `"."`{needs}:

```python
{imports}

question = "If you had a time machine, but could only go to the past or the future once and never return, which would you choose and why?"
generator = pipeline("text-generation", {model})
output = generator([{messages}], max_new_tokens=128, return_full_text=False)[0]
print(output["generated_text"])
```"""
WITH_ADAPTER = {
    "needs": ", and with `isaerft-sweep` installed",
    "imports": 'from isaerft_sweep.adapter import load_model\nfrom transformers import pipeline\n\nmodel, tokenizer = load_model(".")',
    "model": "model=model, tokenizer=tokenizer",
}
ALONE = {"needs": "", "imports": "from transformers import pipeline", "model": 'model="."'}
WITH_OWN_CODE = {**ALONE, "model": 'model=".", trust_remote_code=True'}


@dataclass(frozen=True)
class Paper:
    """Where a method comes from; ``key``: of its BibTeX entry."""

    method: str
    title: str
    arxiv: str
    key: str
    authors: str
    year: int


METHODS = {
    "orpo": Paper(
        "ORPO",
        "ORPO: Monolithic Preference Optimization without Reference Model",
        "2403.07691",
        "hong2024orpo",
        "Jiwoo Hong and Noah Lee and James Thorne",
        2024,
    ),
    "dpo": Paper(
        "DPO",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "2305.18290",
        "rafailov2023dpo",
        "Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and Christopher D. Manning and Chelsea Finn",
        2023,
    ),
    "simpo": Paper(
        "SimPO",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "2405.14734",
        "meng2024simpo",
        "Yu Meng and Mengzhou Xia and Danqi Chen",
        2024,
    ),
    "cpo": Paper(
        "CPO",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        "2401.08417",
        "xu2024cpo",
        "Haoran Xu and Amr Sharaf and Yunmo Chen and Weiting Tan and Lingfeng Shen and Benjamin Van Durme and Kenton Murray and Young Jin Kim",
        2024,
    ),
}
"""By ``orpo.loss``."""


def method(loss: str) -> str:
    """The method of an ``orpo.loss``, with its paper."""
    paper = METHODS[loss]
    return f"{paper.method}, a method introduced in [{paper.title}](https://huggingface.co/papers/{paper.arxiv})"


def citations(loss: str) -> str:
    """BibTeX of the method and of TRL."""
    paper = METHODS[loss]
    return f"""\
Cite {paper.method} as:

```bibtex
@article{{{paper.key},
    title        = {{{{{paper.title}}}}},
    author       = {{{paper.authors}}},
    year         = {paper.year},
    eprint       = {{arXiv:{paper.arxiv}}}
}}
```

{TRL}"""


TRL = """\
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
```"""


def quick_start(placeholders: Mapping[str, str], system_prompt: str | None = None) -> str:
    """Text and code that load the card's folder. ``placeholders``: values for ``QUICK_START``."""
    system = f'{{"role": "system", "content": {json.dumps(system_prompt)}}}, ' if system_prompt else ""
    filled = QUICK_START.replace("{messages}", system + '{"role": "user", "content": question}')
    for name, value in placeholders.items():
        filled = filled.replace("{" + name + "}", value)
    return filled
