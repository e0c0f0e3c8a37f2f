"""What a run prints before it loads models: what it is, what it will need, and warnings if that is too much."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from opsd.config import TrainConfig
from opsd.estimate.command import PlanConfig, planned, verdict
from opsd.utils.errors import UserError
from opsd.utils.paths import model_name

# A run that may take longer than this, in seconds, prints a warning.
LONG_S = 24 * 3600.0


def opening(run: TrainConfig, ranks: int, longest_prompt: int) -> list[str]:
    """Which models, how much a step generates at most, and the plan's verdict; then warnings, one line each.

    longest_prompt: in tokens. A model whose family cannot be planned can still be trained.
    """
    run = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, max_prompt_tokens=longest_prompt))
    size = run.prompts_per_step * run.rollout.samples_per_prompt
    teachers = "itself" if run.teacher.is_student else " and ".join(map(model_name, run.teacher_paths().values()))
    who = (
        f"{Path(run.out).name}: {model_name(run.student)} learns from {teachers}, {run.engine.dtype}, "
        f"{size} answers per step of at most {run.rollout.max_new_tokens:,} tokens"
    )
    try:
        plan = PlanConfig(run=run, gpus=ranks, hardware="cpu" if run.engine.device == "cpu" else "this")
        found = planned(plan, adapters=False)
    except UserError as error:
        return [who, f"no plan: {error}"]
    lines = [who, f"plan: {verdict(found)}"]
    if not found["fits"]:
        lines.append(f"warning: the run may run out of memory; {found['knob']} reduces it")
    if (whole_s := found["steps"] * sum(found["rough_seconds"].values())) > LONG_S:
        lines.append(
            f"warning: it may take {whole_s / LONG_S:.1f} days if answers get long; fewer --steps, or a smaller "
            "--prompts_per_step, --rollout.samples_per_prompt or --rollout.max_new_tokens, shorten it"
        )
    return lines
