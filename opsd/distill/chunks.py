"""How many tokens are worked on at once, and the buffers they are worked on in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import psutil
import torch
from torch import Tensor

from opsd.distill.divergence import SCRATCH_BUFFERS
from opsd.distill.slices import slices
from opsd.errors import UserError
from opsd.memory import is_out_of_memory

Result = TypeVar("Result")


@dataclass
class ChunkBound:
    """Most tokens whose logits exist at once, over a run's life: it falls by halves where memory runs out.

    tokens: the bound as it is now. halvings: how often it fell.
    """

    tokens: int | Literal["auto"]
    halvings: int = 0


ChunkTokens = int | Literal["auto"] | ChunkBound

# "auto" takes this share of the free memory, within bounds: more rows stop paying once the products run at full
# rate (the head's gradient is read and written once a chunk, which 256 rows hide well on a CPU).
FREE_SHARE = 0.25
MIN_CHUNK_TOKENS = 16
MAX_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
# Element-wise passes walk a chunk in blocks of rows whose buffers take this much: about what stays in a CPU's
# last-level cache between two passes; on CUDA, enough to fill the device.
BLOCK_BYTES = {"cpu": 12 * 2**20, "cuda": 512 * 2**20}


def chunk_rows(chunk_tokens: ChunkTokens, rows: int, vocab_size: int, like: Tensor, wide: torch.dtype) -> int:
    """Rows a chunk: at most `chunk_tokens`, evened out so that the last chunk is no stub.

    "auto" asks the free memory of `like`'s device. Raises UserError for a bound below 1.
    """
    if isinstance(chunk_tokens, ChunkBound):
        chunk_tokens = chunk_tokens.tokens
    if chunk_tokens == "auto":
        bytes_per_row = 2 * vocab_size * wide.itemsize + (2 * vocab_size if like.is_cuda else 0)
        most = MAX_CHUNK_TOKENS["cuda" if like.is_cuda else "cpu"]
        affordable = int(FREE_SHARE * _free_bytes(like.device)) // bytes_per_row
        bound = max(MIN_CHUNK_TOKENS, min(most, affordable))
    elif isinstance(chunk_tokens, int) and chunk_tokens >= 1:
        bound = chunk_tokens
    else:
        raise UserError(f"chunk_tokens {chunk_tokens!r}: give a number of tokens from 1, or 'auto'")
    return math.ceil(rows / math.ceil(rows / bound)) if rows else 1


def in_chunks(
    run: Callable[[int], Result],
    chunk_tokens: ChunkTokens,
    rows: int,
    vocab_size: int,
    like: Tensor,
    wide: torch.dtype,
) -> Result:
    """run(rows a chunk), a whole pass; where memory runs out, the pass again from its start with half of the rows.

    So the result is that of the smaller chunk, and nothing is counted twice. A `ChunkBound` stays at what it fell to.
    The pass must undo what an earlier try of it left. Memory that runs out on a single row is the caller's to name.
    """
    bound = chunk_tokens if isinstance(chunk_tokens, ChunkBound) else ChunkBound(chunk_tokens)
    while True:
        chunk = chunk_rows(bound, rows, vocab_size, like, wide)
        try:
            return run(chunk)
        except Exception as error:
            if chunk == 1 or not is_out_of_memory(error):
                raise
        # Behind the except clause: its traceback held the buffers.
        bound.tokens, bound.halvings = chunk // 2, bound.halvings + 1
        if like.is_cuda:
            torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class Workspace:
    """The buffers a call reuses over its chunks: both models' logits [C, V], scratch for a block of rows [S, B, V]."""

    student_CV: Tensor
    teacher_CV: Tensor
    scratch_SBV: Tensor

    @classmethod
    def allocate(cls, rows: int, vocab_size: int, like: Tensor, wide: torch.dtype, teacher: bool = True) -> Workspace:
        """Buffers for `rows` tokens on `like`'s device; without a teacher its buffer is empty."""
        # Whole rows for each thread, and as many for one as for another.
        threads = 1 if like.is_cuda else torch.get_num_threads()
        per_step = threads * (2 + SCRATCH_BUFFERS) * vocab_size * wide.itemsize
        block = min(rows, threads * max(1, BLOCK_BYTES["cuda" if like.is_cuda else "cpu"] // per_step))

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, vocab_size, dtype=wide, device=like.device)

        return cls(empty(rows), empty(rows if teacher else 0), empty(SCRATCH_BUFFERS, block))

    def blocks(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the first `rows` rows, each with scratch of its height."""
        for block in slices(rows, self.scratch_SBV.shape[1]):
            yield block, self.scratch_SBV[:, : block.stop - block.start]
