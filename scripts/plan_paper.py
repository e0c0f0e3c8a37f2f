#!/usr/bin/env python
"""`opsd plan` for the paper's pairs at each retention, next to the paper's peak memory (its Table 3).

    python scripts/plan_paper.py

The settings are those of recipes/common.sh that memory depends on, with every response at its maximum length. It prints
the training peak, in GB of 10^9 bytes as in the paper, without vLLM's share (it sleeps during training) and without the
process itself.
"""

from __future__ import annotations

from opsd.config.cli import parse
from opsd.estimate.command import PlanConfig, planned
from opsd.estimate.memory import GIB, PROCESS_GIB
from reporting.paper import MEMORY, Paper
from reporting.runs import CellName

PAIRS = {
    "qwen3": "--student qwen3-4b --teacher qwen3-8b --gpus 8",
    "llama": "--student llama-3.1-8b --teacher llama-3.3-70b --gpus 8 --teacher.shard True",
    "qwen25": "--student qwen2.5-1.5b --teacher qwen2.5-14b --gpus 4",
}
RECIPE = (
    "--hardware h200 --rollout.samples_per_prompt 16 --rollout.max_prompt_tokens 2048 --rollout.max_new_tokens 8192 "
    "--engine.micro_batch_tokens 16384 --engine.dtype bfloat16 --engine.kind deepspeed "
    "--rollout.engine vllm --engine.gradient_checkpointing True --select.by entropy_sample"
)
RETENTIONS = (1.0, 0.5, 0.2, 0.1)


# The teacher's weights sharded and in host memory, its states in host memory too.
LEAN = ("--teacher.shard", "True", "--teacher.offload", "True", "--teacher.cache", "host")


def training_gb(pair: str, memory: str, retention: float, further: tuple[str, ...] = ()) -> float:
    """Peak GB of a rank in training, over all phases but the rollout."""
    flags = [*PAIRS[pair].split(), *RECIPE.split(), "--loss.memory", memory, "--select.retention", str(retention)]
    flags += further
    phases = planned(parse(PlanConfig, flags, "plan_paper"))["phases_gib"]
    peak = max(sum(parts.values()) for phase, parts in phases.items() if phase != "rollout")
    return (peak - PROCESS_GIB["cuda"]) * GIB / 1e9


def main() -> None:
    """Print the table as Markdown."""
    paper = Paper.read("table3")
    print(
        "| pair | tokens kept | fused, GB | whole, GB | fused, teacher in host memory, GB | paper, GB |\n"
        "|:--|--:|--:|--:|--:|--:|"
    )
    for pair in PAIRS:
        for retention in RETENTIONS:
            ours = " | ".join(f"{training_gb(pair, memory, retention):.1f}" for memory in ("fused", "whole"))
            cell = CellName("all" if retention == 1 else "entropy_sample", retention)
            theirs = paper.value(pair, MEMORY, cell)
            lean = training_gb(pair, "fused", retention, LEAN)
            print(f"| {pair} | {retention:.0%} | {ours} | {lean:.1f} | {theirs} |")


if __name__ == "__main__":
    main()
