"""One training for opsd and for TRL's DistillationTrainer alike: on-policy, reverse KL, fp32 on a CPU, constant rate.

settings: method, out, steps, student, teacher, prompts_file, answers (prompts of a step, each with one answer),
prompt_tokens (of the longest), new_tokens, lr; of methods that select (opsd-…-tip, trl-ENGINE) selector and retention.
"""

from __future__ import annotations

from typing import Any


def opsd_config(settings: dict[str, Any]) -> Any:
    """What `opsd train` is told."""
    from opsd.config import from_json

    return from_json(
        {
            "student": settings["student"],
            "teacher": {"model": settings["teacher"]},
            "prompts": settings["prompts_file"],
            "prompt_format": "raw",
            "out": settings["out"],
            "steps": settings["steps"],
            "prompts_per_step": settings["answers"],
            "rollout": {
                "engine": "vllm" if "vllm" in settings["method"] else "hf",
                "samples_per_prompt": 1,
                "max_prompt_tokens": settings["prompt_tokens"],
                "max_new_tokens": settings["new_tokens"],
            },
            "select": {
                "by": settings["selector"] if settings["method"].endswith("-tip") else "all",
                "retention": settings["retention"],
                "normalise_over": "rollout",
            },
            "optim": {"lr": settings["lr"], "schedule": "constant"},
            "engine": {"device": "cpu"},
            "checkpoint": {"every": 0},
            "telemetry": {"every": 0, "save_rollouts_every": 1},
            "track": {"progress": False},
        }
    )


def trl_trainer(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of TRL's trainer, and the arguments that selection adds to it."""
    from trl.trainer.distillation_trainer import DistillationTrainer

    engine = settings["method"].partition("-")[2]
    if not engine:
        return DistillationTrainer, {}
    from tip_patch.adapters.trl import tip

    options = {"retention": settings["retention"], "normalise_over": "rollout"}
    more = {"selector": settings["selector"], "selector_options": options, "engine": engine, "telemetry_every": 0}
    return tip(DistillationTrainer), more


def trl_config(settings: dict[str, Any], micro_batches: int = 1, **more: Any) -> Any:
    """TRL's settings. more: of DistillationConfig."""
    from trl.trainer.distillation_config import DistillationConfig

    return DistillationConfig(
        output_dir=settings["out"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["answers"] // micro_batches,
        gradient_accumulation_steps=micro_batches,
        gradient_checkpointing=False,
        max_completion_length=settings["new_tokens"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        **more,
    )
