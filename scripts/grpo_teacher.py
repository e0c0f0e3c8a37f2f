#!/usr/bin/env python
"""Train a teacher by GRPO, like the paper's Qwen3 teacher: TRL's trainer, this project's prompts and grader.

    python scripts/grpo_teacher.py --model MODEL --prompts prompts.jsonl --out runs/teacher --steps 100
    accelerate launch … scripts/grpo_teacher.py … --vllm colocate --dtype bfloat16

Needs the extra `trl`. Writes OUT/model (a folder that `opsd train --teacher` takes), OUT/metrics.jsonl, OUT/DONE, and
TRL's checkpoints, from which the same command continues after an interruption.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from opsd.config.cli import parse
from opsd.config.settings import (
    Bound,
    LengthSettings,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PromptSettings,
    ProperFraction,
    StepSettings,
)
from opsd.data.prompts import load_prompts, read_records
from opsd.data.rendering import PromptFormat, lookup
from opsd.eval.grading import Grader, load_grader
from opsd.model.loading import load_tokenizer
from opsd.utils.errors import UserError, exits_on_bad_input


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(PromptSettings, LengthSettings, StepSettings):
    """GRPO on prompts with gold answers; names as in `opsd train`."""

    model: str
    """Folder (or hub name) of the model to start from."""
    samples_per_prompt: Annotated[int, Bound(lambda count: count > 1, "2 or more: GRPO compares samples")] = 16
    """Completions per prompt, whose rewards are compared with each other."""
    grader: str = "math"
    """math, suffix or module:function, as --eval.grader of `opsd train`."""
    grade_seconds: PositiveFloat = 300.0
    """Seconds that one process may grade a batch; answers left by then count as wrong (grade/late_frac)."""
    temperature: PositiveFloat = 1.0
    lr: PositiveFloat = 1e-6
    """Peak learning rate, with cosine decay."""
    warmup_steps: NonNegativeInt = 0
    beta: NonNegativeFloat = 0.0
    """Weight of the KL to the starting model; 0 is off and loads no second copy."""
    micro_batch: PositiveInt = 1
    """Completions in one forward pass of a process."""
    vllm: Literal["off", "colocate", "server"] = "off"
    """off: transformers generate. colocate: vLLM in the training processes. server: `trl vllm-serve` elsewhere."""
    gpu_memory_share: ProperFraction = 0.3
    """colocate: fraction of each GPU's memory for vLLM."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; weights stay fp32."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints."""


class GradeReward:
    """The reward for TRL: 1.0 if the grader finds the gold answer, else 0.0; a truncated completion gets 0.0.

    The grader reads a text and never runs it. Each question has the grader's own time limit, a batch has `seconds`;
    answers that are not graded by then get 0.0. Equal (completion, gold) pairs are graded once.
    """

    __name__ = "grade"  # what TRL calls the metric

    def __init__(self, grader: Grader, eos_id: int, seconds: float) -> None:
        self._grader, self._eos_id, self._seconds = grader, eos_id, seconds

    def __call__(
        self, *, completions: list[Any], completion_ids: list[list[int]], answer: list[str], **more: Any
    ) -> list[float | None]:
        """One reward per completion; `completions` are texts, or lists of chat messages whose last one is graded."""
        end, late = time.monotonic() + self._seconds, 0
        known: dict[tuple[str, str], float] = {}
        rewards: list[float | None] = []
        for completion, ids, gold in zip(completions, completion_ids, answer, strict=True):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            if not ids or ids[-1] != self._eos_id:
                rewards.append(0.0)
                continue
            if (text, gold) not in known:
                if time.monotonic() >= end:
                    late += 1
                    rewards.append(0.0)
                    continue
                known[text, gold] = float(self._grader.grade(text, gold))
            rewards.append(known[text, gold])
        if "log_metric" in more:
            more["log_metric"]("grade/late_frac", late / max(1, len(completions)))
        return rewards


def training_rows(config: GrpoConfig, tokenizer: Any) -> list[dict[str, Any]]:
    """Prompt (a text, or chat messages) and gold answer of every record that is short enough.

    Raises UserError for a file that cannot be read, and for a missing answer: without one the reward is noise.
    """
    how = PromptFormat.of(config, max_tokens=config.max_prompt_tokens, overlong="drop")
    kept, _ = load_prompts(config.prompts, tokenizer, how)
    rows, waiting = [], iter(kept)
    due = next(waiting, None)
    for number, record in enumerate(read_records(config.prompts)):
        name = str(number if record.get("id") is None else record["id"])
        if due is None or due.id != name:
            continue
        if due.answer is None:
            raise UserError(f"{config.prompts} record {number + 1} has no answer; GRPO needs one for each prompt")
        content = lookup(record, config.prompt_field, config.prompts)
        if config.prompt_format == "chat" and isinstance(content, str):
            content = [{"role": "user", "content": content}]
        rows.append({"prompt": content, "answer": due.answer})
        due = next(waiting, None)
    return rows


def trainer_settings(config: GrpoConfig, processes: int, cuda: bool) -> dict[str, Any]:
    """GRPOConfig's fields. Raises UserError if a step's completions do not divide over the processes."""
    total, at_once = config.prompts_per_step * config.samples_per_prompt, config.micro_batch * processes
    if total % at_once:
        raise UserError(
            f"{total} completions per step do not divide over {processes} processes times --micro_batch "
            f"{config.micro_batch}; change one of them"
        )
    bfloat16 = config.dtype == "bfloat16"
    return {
        "output_dir": config.out,
        "max_steps": config.steps,
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": total // at_once,
        "num_generations": config.samples_per_prompt,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "learning_rate": config.lr,
        "warmup_steps": config.warmup_steps,
        "lr_scheduler_type": "cosine",
        "beta": config.beta,
        "bf16": bfloat16,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
        "model_init_kwargs": {"dtype": "float32", "use_safetensors": True, "trust_remote_code": False},
        "chat_template_kwargs": {"enable_thinking": config.thinking == "on"},
        "use_vllm": config.vllm != "off",
        **({} if config.vllm == "off" else {"vllm_mode": config.vllm}),
        **({"vllm_gpu_memory_utilization": config.gpu_memory_share} if config.vllm == "colocate" else {}),
        "save_steps": config.checkpoint_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def train(config: GrpoConfig) -> Path:
    """Train, or continue from the newest checkpoint; returns the folder of the finished model."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise UserError(f"TRL is not installed ({error}); run: pip install -e '.[trl]'") from error
    import torch
    from datasets import Dataset
    from transformers.trainer_utils import get_last_checkpoint

    out = Path(config.out)
    tokenizer = load_tokenizer(config.model, "--model")
    rows = training_rows(config, tokenizer)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = trainer_settings(config, processes, torch.cuda.is_available())
    trainer = GRPOTrainer(
        model=config.model,
        reward_funcs=GradeReward(load_grader(config.grader, "--grader"), tokenizer.eos_token_id, config.grade_seconds),
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    newest = get_last_checkpoint(config.out) if out.is_dir() else None
    trainer.train(resume_from_checkpoint=newest)
    trainer.save_model(str(out / "model"))
    if trainer.accelerator.is_main_process:
        (out / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.json holds the settings
        lines = [json.dumps(line) + "\n" for line in trainer.state.log_history]
        (out / "metrics.jsonl").write_text("".join(lines))
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
        (out / "DONE").touch()
    return out / "model"


def main() -> None:
    """Read the settings, and train."""
    with exits_on_bad_input("grpo_teacher"):
        model = train(parse(GrpoConfig, sys.argv[1:], "grpo_teacher"))
    print(f"{model}: a teacher; opsd train --teacher takes it")


if __name__ == "__main__":
    main()
