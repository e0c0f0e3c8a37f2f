"""Memory, as Linux counts it, in a fresh process a case; and how chunks follow the free memory."""

import sys

import psutil
import pytest
import torch
from forked import python
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.distill import distill_loss
from opsd.distill.chunks import chunk_rows

VOCAB, WIDTH = 12_000, 64

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")

CHILD = """
import sys
import torch
from opsd.distill import distill_loss

tokens, vocab, width, chunk, dtype, memory = *map(int, sys.argv[1:5]), getattr(torch, sys.argv[5]), sys.argv[6]
torch.set_num_threads(2)
torch.manual_seed(0)

def tensors(tokens):
    make = lambda rows: torch.randn(rows, width).to(dtype)
    return make(tokens).requires_grad_(), make(vocab).requires_grad_(), make(tokens), make(vocab)

def status_kib(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

# A first call on a few rows of a few words: libraries load and allocate their own buffers.
small = [tensor.detach()[:8].requires_grad_() for tensor in tensors(8)]
distill_loss(*small).loss_sum.backward()
student, head, teacher, teacher_head = tensors(tokens)
gradients_kib = sum(tensor.numel() * tensor.element_size() for tensor in (student, head)) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew at what is resident now
before = status_kib("VmRSS")
distill_loss(student, head, teacher, teacher_head, chunk_tokens=chunk, memory=memory).loss_sum.backward()
print(status_kib("VmHWM") - before - gradients_kib)
"""


def peak_mib(tokens, chunk=128, dtype="float32", memory="fused"):
    """Peak of a loss with its backward above inputs and their gradients."""
    arguments = [str(value) for value in (tokens, VOCAB, WIDTH, chunk, dtype, memory)]
    done = python("-c", CHILD, *arguments)
    assert done.returncode == 0, done.stderr
    return float(done.stdout) / 1024


@linux
@pytest.mark.e2e
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_does_not_grow_with_the_tokens(dtype):
    few, many = peak_mib(1024, dtype=dtype), peak_mib(8192, dtype=dtype)
    # Two [128, 12000] buffers in fp32 are 11.7 MiB. A byte for each of 7168 further tokens and 12000 entries would be
    # 82 MiB; the allocator leaves up to 3 MiB unused between small pieces.
    assert many == pytest.approx(few, abs=4.0)
    assert many < 40


@linux
@pytest.mark.e2e
def test_peak_memory_follows_the_chunk_size():
    # Two buffers of 384 further rows: 2 · 384 · 12000 · 4 bytes = 35.2 MiB. Tiles of 2048 columns: 3 MiB each.
    assert 33 < peak_mib(1024, chunk=512) - peak_mib(1024, chunk=128) < 35.2 + 4 * 3


@linux
@pytest.mark.e2e
def test_memory_whole_keeps_all_logits_as_it_promises():
    # At least both models' log-probabilities of 1024 tokens: 2 · 1024 · 12000 · 4 bytes = 94 MiB.
    assert peak_mib(1024, memory="whole") > 94


class NewTensors(TorchDispatchMode):
    """The shapes of all tensors that operations give out in storage of their own."""

    def __init__(self, known):
        super().__init__()
        self.seen, self.shapes = {tensor.untyped_storage().data_ptr() for tensor in known}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.seen:
            self.shapes.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("memory", ["fused", "whole"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_head_costs_no_gradient_buffer_of_its_size(memory, frozen):
    # 90 tokens of width 16, 300 words: nothing but the head's gradient has the shape [300, 16].
    student, head, teacher, teacher_head = (torch.randn(rows, 16) for rows in (90, 300, 90, 300))
    student.requires_grad_()
    head.requires_grad_(not frozen)
    with NewTensors([student, head, teacher, teacher_head]) as new:
        distill_loss(student, head, teacher, teacher_head, chunk_tokens=30, memory=memory).loss_sum.backward()
    assert ((300, 16) in new.shapes) == (not frozen)
    assert student.grad is not None and (head.grad is None) == frozen


@pytest.mark.parametrize(
    ("available_gib", "rows"),
    [
        (64.0, 250),  # plenty: the most that pays on a CPU is 256; 1000 tokens are four even chunks of 250
        (0.46, 100),  # a quarter is 0.115 GiB; a row's logits take 2 · 152000 · 4 bytes: 101 rows, ten chunks of 100
        (0.001, 16),  # next to nothing: 16 rows all the same
    ],
)
def test_auto_asks_for_a_quarter_of_the_free_memory(available_gib, rows, monkeypatch):
    class Memory:
        available = int(available_gib * 2**30)

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    assert chunk_rows("auto", 1000, 152_000, torch.empty(0), torch.float32) == rows


@pytest.mark.parametrize(
    ("bound", "tokens", "rows"), [(300, 1000, 250), (512, 1000, 500), (7, 7, 7), (9, 4, 4), (5, 0, 1)]
)
def test_a_chunk_bound_is_kept_and_evened_out(bound, tokens, rows):
    # 1000 rows under a bound of 300 need four chunks: 250 each, rather than three of 300 and a stub of 100.
    assert chunk_rows(bound, tokens, 100, torch.empty(0), torch.float32) == rows
