"""Out of memory: names the stage of the run and the flags that help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from opsd.utils.errors import RunStopped, first_line, is_out_of_memory

# What saves memory, by stage of a run. None of these flags changes what is learned: a resumed run may take them.
HELP = {
    "loading": "--teacher.offload True or --teacher.shard True reduce what the teacher holds, "
    "--engine.kind deepspeed with --engine.zero_stage 3 shards the student",
    "rollout": "give a smaller --rollout.generate_batch (vllm: another --rollout.gpu_memory_share)",
    "teacher": "give a smaller --engine.micro_batch_tokens, --teacher.cache host or --teacher.offload True",
    "student": "give a smaller --engine.micro_batch_tokens, or --engine.gradient_checkpointing True",
    "loss": "give --loss.memory fused and a smaller --engine.micro_batch_tokens",
    "optimiser": "give --engine.offload_optimizer True or a higher --engine.zero_stage (--engine.kind deepspeed)",
    "evaluation": "give a smaller --eval.generate_batch",
    "checkpoint": "free host memory: all weights and optimiser state are gathered there",
}
WORDS = {"loading": "loading stage", "student": "student's forward and backward"}


@contextlib.contextmanager
def memory_for(stage: str, then: str = "continue with --resume") -> Iterator[None]:
    """Context in which running out of memory raises RunStopped, with one line: the stage and what helps."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunStopped) or not is_out_of_memory(error):
            raise
        what = f"out of memory in the {WORDS.get(stage, stage)} ({first_line(error)[:160]})"
        raise RunStopped(f"{what}: {HELP.get(stage, 'free memory on this machine')}; {then}") from error
