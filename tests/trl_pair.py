"""TRL's DistillationTrainer on the tiny pair, with answers that are fixed by hand: uneven, one of them empty.

Imported within tests and workers only: TRL takes ten seconds, and vLLM, which nothing here needs, twenty more.
"""
# ruff: noqa: E402

import os
from typing import Any

from tiny_models import build_model, plain_tokenizer, tiny_model
from trl import import_utils

import_utils.is_vllm_available = lambda *_, **__: False

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

os.environ.setdefault("WANDB_DISABLED", "true")
PROMPTS = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
LENGTHS = [7, 3, 0, 9, 1, 6, 10, 4, 8, 2, 5, 10, 3, 7, 1, 9]


def answer(prompt_ids: list[int]) -> list[int]:
    """A prompt's answer: between 0 and 10 tokens."""
    a, b = prompt_ids[0] - 3, prompt_ids[2] - 3
    return [3 + (7 * a + 5 * b + place * place) % 40 for place in range(LENGTHS[4 * a + b])]


def tool_mask(ids: list[int]) -> list[int]:
    """1 where the student wrote: of the longer answers every third token is a tool's."""
    return [int(len(ids) < 5 or place % 3 != 1) for place in range(len(ids))]


def fixed(trainer: type, tools: bool = False) -> Any:
    """The class with the answers above in place of generation."""

    class Fixed(trainer):
        def _generate(self, prompts: list[str]) -> Any:
            prompt_ids = self._tokenizer(prompts)["input_ids"]
            ids = [answer(one) for one in prompt_ids]
            return prompt_ids, ids, [tool_mask(one) for one in ids] if tools else None, None, [None] * len(ids)

    return Fixed


class Gradients(TrainerCallback):
    """All gradients in front of each optimiser step, as one vector each."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        gradients = [p.grad for p in more["model"].parameters() if p.requires_grad]
        self.found.append(torch.cat([g.detach().flatten().float().clone() for g in gradients if g is not None]))


def config(out: Any, **more: Any) -> DistillationConfig:
    values: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "max_completion_length": 10,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "seed": 3,
    }
    return DistillationConfig(**{**values, **more})


def make(trainer: Any, out: Any, pair: Any = None, prompts: Any = None, settings: Any = None, **more: Any) -> Any:
    """A trainer of that class; settings: of the configuration; more: of the constructor."""
    student, teacher = pair or (tiny_model(True, 0), tiny_model(True, 1))
    data = Dataset.from_list(prompts or PROMPTS)
    arguments = config(out, **(settings or {}))
    return trainer(student, teacher, arguments, train_dataset=data, processing_class=plain_tokenizer(), **more)


def run(trainer: type, out: Any, tools: bool = False, **more: Any) -> Any:
    """A trainer that has trained, with `gradients` of each step."""
    gradients = Gradients()
    made = make(fixed(trainer, tools), out, callbacks=[gradients], **more)
    made.train()
    made.gradients = gradients.found
    return made


def logs(trainer: Any) -> list[dict[str, Any]]:
    """What it logged of each step."""
    return [line for line in trainer.state.log_history if "loss" in line]


__all__ = ["DistillationTrainer", "build_model", "fixed", "logs", "make", "plain_tokenizer", "run", "tiny_model"]
