"""Text that every card has: the quick start, names of blocks and frameworks, citations."""

from __future__ import annotations

from collections.abc import Mapping

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
}
QUICK_START = """\
In the folder of this card, or with its Hub name instead of `"."`{needs}:

```python
{imports}

question = "If you had a time machine, but could only go to the past or the future once and never return, which would you choose and why?"
generator = pipeline("text-generation", {model})
output = generator([{"role": "user", "content": question}], max_new_tokens=128, return_full_text=False)[0]
print(output["generated_text"])
```"""
WITH_ADAPTER = {
    "needs": ", and with `isaerft-sweep` installed",
    "imports": 'from isaerft_sweep.adapter import load_model\nfrom transformers import pipeline\n\nmodel, tokenizer = load_model(".")',
    "model": "model=model, tokenizer=tokenizer",
}
ALONE = {"needs": "", "imports": "from transformers import pipeline", "model": 'model="."'}
WITH_OWN_CODE = {**ALONE, "model": 'model=".", trust_remote_code=True'}
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
```"""


def quick_start(placeholders: Mapping[str, str]) -> str:
    """Text and code that load the card's folder. ``placeholders``: values for ``QUICK_START``."""
    filled = QUICK_START
    for name, value in placeholders.items():
        filled = filled.replace("{" + name + "}", value)
    return filled
