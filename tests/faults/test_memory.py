"""Memory that runs out: the loss halves its chunk and counts once; elsewhere the run stops with the part and the flag.

And memory that does not grow: 500 steps.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import python
from runs import ENVIRONMENT, ROOT, flags
from tiny_models import tiny_pair
from tolerance import close, rounding

from opsd.config import from_json
from opsd.distill import distill_loss, token_stats
from opsd.distill.chunks import ChunkBound
from opsd.distill.inputs import LossSpec, check_inputs
from opsd.distill.matmul import Projection
from opsd.distill.topk import top_tokens
from opsd.distill.workspace import Workspace
from opsd.engine import TorchEngine
from opsd.eval.evaluator import Evaluator
from opsd.model.scorer import Scorer
from opsd.rollout import decode
from opsd.selection import load_selector
from opsd.teacher import LocalTeacher
from opsd.train import Trainer, start
from opsd.utils.errors import RunStopped, is_out_of_memory

HERE = Path(__file__).parent
# What the allocators of torch say, and Python's own.
CPU_SAYS = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "9663676416 bytes. Error code 12 (Cannot allocate memory)"
)
SAYINGS = [CPU_SAYS, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")]


def case(dtype=torch.float32):
    """Hidden states of 37 tokens and heads of 101 rows, with a mask and weights."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    kept_N = torch.arange(37) % 3 > 0
    return (
        (normal(37, 8).requires_grad_(), normal(101, 8).requires_grad_(), normal(37, 12), normal(101, 12)),
        {"kept_N": kept_N, "weight_N": torch.rand(37, generator=generator)},
    )


class Fails:
    """Raise where a method is called for the n-th time, before or behind what it does."""

    def __init__(self, patch, owner, name, calls, behind=False, error=None):
        whole, self.calls = getattr(owner, name), 0

        def method(*args, **kwargs):
            self.calls += 1
            if self.calls in calls and not behind:
                raise error or CPU_SAYS
            result = whole(*args, **kwargs)
            if self.calls in calls:
                raise error or CPU_SAYS
            return result

        patch.setattr(owner, name, method)


@pytest.mark.fault(
    "memory runs out in the loss, before or after any of its products, in the first, a middle or several chunks",
    "chunks have half as many rows from then on; loss and gradients equal those of the smaller chunk bit for bit",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["project_", "gradients_"])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(("calls", "chunk"), [({1}, 6), ({2}, 6), ({2, 4}, 3)])
def test_a_halved_chunk_counts_nothing_twice(monkeypatch, dtype, name, behind, calls, chunk):
    def run(bound):
        tensors, more = case(dtype)
        result = distill_loss(*tensors, chunk_tokens=bound, **more)
        result.loss_sum.backward()
        return result.loss_sum, tensors[0].grad, tensors[1].grad

    expected = run(chunk)
    with monkeypatch.context() as patch:
        Fails(patch, Projection, name, calls, behind)
        bound = ChunkBound(13)  # 24 kept rows: two chunks of 12
        found = run(bound)
    assert bound == ChunkBound(chunk, halvings=len(calls))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.fault(
    "memory runs out while logits are kept for selection and the loss, or in the loss that reads them",
    "the pass continues chunk by chunk, with the same loss and gradients",
)
@pytest.mark.parametrize(("owner", "name", "calls"), [(Workspace, "allocate", {1}), (Projection, "gradients_", {1})])
def test_held_logits_that_do_not_fit_are_done_without(monkeypatch, owner, name, calls):
    def run(bound):
        tensors, more = case()
        more = {"weight_N": more["weight_N"], "selector": load_selector("soft_or", retention=0.5)}
        result = distill_loss(*tensors, chunk_tokens=bound, **more)
        result.loss_sum.backward()
        return result.loss_sum, tensors[0].grad, tensors[1].grad

    expected = run(9)
    bound = ChunkBound(37)
    with monkeypatch.context() as patch:
        Fails(patch, owner, name, calls)
        found = run(bound)
    assert bound.halvings == (1 if name == "gradients_" else 0)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, 8, 12, 101, 37)


@pytest.mark.fault(
    "memory runs out while tokens are scored, or while the likeliest tokens are recorded",
    "the same statistics, with half as many rows per chunk",
)
def test_scores_with_a_halved_chunk_are_the_same(monkeypatch):
    tensors = [tensor.detach() for tensor in case()[0]]
    inputs = check_inputs(*tensors, token_ids_N=torch.arange(37))
    expected = token_stats(*tensors, chunk_tokens=5), top_tokens(inputs, 3, LossSpec(chunk_tokens=5))
    bounds = ChunkBound(10), ChunkBound(10)
    with monkeypatch.context() as patch:
        Fails(patch, Projection, "project_", {4})
        stats = token_stats(*tensors, chunk_tokens=bounds[0])
    with monkeypatch.context() as patch:
        Fails(patch, Projection, "project_", {4})
        top = top_tokens(inputs, 3, LossSpec(chunk_tokens=bounds[1]))
    assert [bound.halvings for bound in bounds] == [1, 1]
    assert torch.equal(stats.reverse_kl_N, expected[0].reverse_kl_N)
    assert torch.equal(stats.entropy_N, expected[0].entropy_N)
    for ours, theirs in zip(top, expected[1], strict=True):
        assert torch.equal(ours.ids_NK, theirs.ids_NK) and torch.equal(ours.log_prob_NK, theirs.log_prob_NK)


@pytest.mark.fault(
    "memory runs out on a single row of the loss; an error that is not about memory",
    "it is raised, never swallowed, and not retried for ever",
)
def test_what_halving_cannot_help_is_raised(monkeypatch):
    tensors, more = case()
    with monkeypatch.context() as patch:
        fails = Fails(patch, Projection, "project_", set(range(1, 100)))
        with pytest.raises(RuntimeError, match="allocate memory"):
            distill_loss(*tensors, chunk_tokens=8, **more)
    assert fails.calls == 4  # chunks of 8, 4, 2 and 1 rows
    Fails(monkeypatch, Projection, "project_", {1}, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        distill_loss(*tensors, chunk_tokens=8, **more)


@pytest.mark.fault(
    "every form in which torch and Python report that memory ran out",
    "one function recognises them all, and nothing else",
)
def test_out_of_memory_is_known_in_every_form():
    assert all(is_out_of_memory(error) for error in SAYINGS)
    others = [ValueError("out of memory"), RuntimeError("shape '[2]' is invalid"), RunStopped("out of memory in …")]
    assert not any(is_out_of_memory(error) for error in others)


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict:
    """Settings of a three-step run of tiny models."""
    folder = tmp_path_factory.mktemp("memory")
    pair = tiny_pair(folder)
    return {
        **pair,
        "steps": 3,
        "prompts_per_step": 2,
        "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 5},
        "optim": {"lr": 1e-2},
        "engine": {"device": "cpu", "micro_batch_tokens": 1000},
        "loss": {"chunk_tokens": 8},
        "eval": {"suite": [f"sums={pair['prompts']}"], "samples": 1, "grader": "suffix", "limit": 2, "teacher": False},
        "checkpoint": {"every": 1},
        "telemetry": {"every": 0},
    }


@pytest.mark.e2e
@pytest.mark.fault(
    "memory runs out in the rollout, the teacher, the student, the optimiser, the evaluation or the checkpoint",
    "one line names the part and the flag that helps; exit code 1; what was saved is intact",
)
@pytest.mark.parametrize(
    ("owner", "name", "call", "part", "flag"),
    [
        (decode, "_decode_batch", 3, "rollout", "--rollout.generate_batch"),
        (LocalTeacher, "hidden", 2, "teacher", "--teacher.offload True"),
        (Scorer, "forward", 2, "student's forward and backward", "--engine.gradient_checkpointing True"),
        (TorchEngine, "backward", 2, "student's forward and backward", "--engine.micro_batch_tokens"),
        (TorchEngine, "step", 2, "optimiser", "--engine.offload_optimizer True"),
        (TorchEngine, "optimizer_state", 2, "checkpoint", "host memory"),
        (Evaluator, "run", 2, "evaluation", "--eval.generate_batch"),
    ],
)
@pytest.mark.parametrize("error", SAYINGS, ids=["cpu", "python", "cuda"])
def test_out_of_memory_names_the_part_and_the_flag(values, tmp_path, monkeypatch, owner, name, call, part, flag, error):
    Fails(monkeypatch, owner, name, {call}, error=error)
    with pytest.raises(RunStopped) as stop:
        start(from_json({**values, "out": str(tmp_path / "run")}))
    said = str(stop.value)
    assert f"out of memory in the {part}" in said and flag in said and "--resume" in said and "\n" not in said


@pytest.mark.e2e
@pytest.mark.fault(
    "memory runs out in the loss of step 2 of a run",
    "the run finishes; `loss/chunk_halvings` is 1 in step 2 and 0 elsewhere",
)
def test_a_run_counts_its_halvings_and_goes_on(values, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", []
    whole = Trainer.update

    def update(self, *args, **kwargs):
        seen.append(1)
        with pytest.MonkeyPatch.context() as patch:
            if len(seen) == 2:
                Fails(patch, Projection, "gradients_", {1})
            return whole(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "update", update)
    start(from_json({**values, "out": str(run)}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert [line["loss/chunk_halvings"] for line in lines] == [0, 1, 0]


LIMITED = """
import resource, sys, torch
from opsd.distill import distill_loss
from opsd.distill.chunks import ChunkBound
from opsd.distill.workspace import Workspace

torch.manual_seed(0)
hidden, head = torch.randn(2048, 16), torch.randn(20_000, 16)
teacher_hidden, teacher_head = torch.randn(2048, 16), torch.randn(20_000, 16)


def loss(bound):
    student, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    result = distill_loss(student, weight, teacher_hidden, teacher_head, chunk_tokens=bound)
    result.loss_sum.backward()
    return result.loss_sum.item(), student.grad.norm().item(), weight.grad.norm().item()


expected = loss(64)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# 160 MB a buffer of logits at 2048 rows: two do not fit, those of 256 rows do.
resource.setrlimit(resource.RLIMIT_AS, (size + 120_000_000, -1))
bound = ChunkBound(2048)
found = loss(bound)
print(bound.tokens, bound.halvings, *(abs(a - b) / abs(b) for a, b in zip(found, expected)))
"""


@pytest.mark.numeric
@pytest.mark.e2e
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc are Linux's")
@pytest.mark.fault(
    "a real address-space limit (RLIMIT_AS), with room for only part of the loss's logits",
    "the chunk is halved until it fits; loss and gradients as without a limit",
)
def test_a_real_limit_halves_the_chunk_until_it_fits(seen):
    done = python("-c", LIMITED)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, halvings, *gaps = done.stdout.split()
    assert 1 <= int(tokens) <= 1024 and int(halvings) >= 1
    assert all(float(gap) <= rounding(16, 20_000, 2048) for gap in gaps)
    seen(f"2048 rows to {tokens} in {halvings} halvings")


def resident_mib(pid: int) -> float:
    """A process's resident memory, mapped files included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def watch(run: Path, *args: str) -> dict[int, list[float]]:
    """A run's resident MiB, looked at from outside ten times a second, by the number of steps it had done."""
    seen_mib: dict[int, list[float]] = {}
    metrics = run / "metrics.jsonl"
    command = [sys.executable, "-m", "opsd", "train", *args, "--out", str(run)]
    with (run.parent / "said").open("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=said)
        try:
            while process.poll() is None:
                lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                # One that has just ended has no memory any more.
                with contextlib.suppress(ValueError):
                    seen_mib.setdefault(lines - 1, []).append(resident_mib(process.pid))
                time.sleep(0.1)
        finally:
            process.kill()
        assert process.wait() == 0, (run.parent / "said").read_text()
    return seen_mib


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.fault(
    "500 steps with evaluations, checkpoints, telemetry, token records, saved rollouts and wandb (offline)",
    "resident memory at steps 450 to 500 is less than 1 % above that at steps 100 to 150",
)
def test_500_steps_take_no_more_memory(tmp_path, seen):
    often = {"eval__every": 10, "checkpoint__every": 10, "checkpoint__keep": 2, "telemetry__save_rollouts_every": 10}
    seen_mib = watch(tmp_path / "run", *flags(steps=500, track__wandb="offline", **often))
    # By step 100 all that a step does was done ten times: what libraries keep once is there, the allocator has found
    # its size. What grows from there on grows with the steps: 1 % of 500 MiB in 350 steps are 15 KiB a step.
    before, after = (
        statistics.median(mib for step in steps for mib in seen_mib.get(step, []))
        for steps in (range(100, 151), range(450, 501))
    )
    seen(f"{before:.1f} MiB, then {after:.1f}: {100 * (after / before - 1):+.2f} %")
    assert after < 1.01 * before
