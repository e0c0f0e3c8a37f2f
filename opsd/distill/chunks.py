"""How many tokens are worked on at once."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor

from opsd.utils.errors import UserError, is_out_of_memory


def slices(rows: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` out of `rows`."""
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass
class ChunkBound:
    """Most tokens whose logits exist at once, over a run's life: it falls by halves where memory runs out.

    tokens: the bound as it is now. halvings: how often it fell.
    """

    tokens: int | Literal["auto"]
    halvings: int = 0


ChunkTokens = int | Literal["auto"] | ChunkBound

# "auto" takes this share of the free memory, within bounds: more rows stop paying once the products run at full
# rate (the head's gradient is read and written once per chunk, which 256 rows hide well on a CPU).
FREE_SHARE = 0.25
MIN_CHUNK_TOKENS = 16
MAX_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
# A vocabulary so small that a chunk would have fewer entries than this gets longer chunks: calls then cost the most.
SMALL_CHUNK_ENTRIES = 2**18
# Most that one model's logits may take where they are held for a second reading.
MAX_HELD_BYTES = {"cpu": 150 * 2**20, "cuda": 1200 * 2**20}
# Element-wise passes walk a chunk in blocks of rows whose buffers take this much: about what stays in a CPU's
# last-level cache between two passes; on CUDA, enough to fill the device.
BLOCK_BYTES = {"cpu": 12 * 2**20, "cuda": 512 * 2**20}
# Rows of logits are this many entries wide, or a multiple: tensor cores want rows that start at aligned addresses, and
# the vocabularies of Qwen2.5 and Qwen3 are odd. `Head.project_` fills what is beyond the vocabulary.
ROW_MULTIPLE = {"cpu": 1, "cuda": 64}
# Chunks of one size, micro-batch after micro-batch, are what CUDA's allocator keeps memory for.
CHUNK_MULTIPLE = {"cpu": 1, "cuda": 128}


# Triton needs a compiler of C for what starts its kernels, and takes one of these.
HAS_TRITON = importlib.util.find_spec("triton") is not None and bool(
    os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
)


def has_row_kernels(like: Tensor, wide: torch.dtype) -> bool:
    """Whether `triton_rows` does the element-wise work: on CUDA, for fp32 logits, where triton can run."""
    return HAS_TRITON and like.is_cuda and wide == torch.float32


def row_width(kind: str, vocab_size: int) -> int:
    """Entries of a row of logits in memory, on a device of this kind: the vocabulary, rounded up."""
    multiple = ROW_MULTIPLE[kind]
    return math.ceil(vocab_size / multiple) * multiple


def most_rows(kind: str, vocab_size: int) -> int:
    """Most rows of an "auto" chunk on a device of this kind, however much memory is free."""
    return max(MAX_CHUNK_TOKENS[kind], SMALL_CHUNK_ENTRIES // vocab_size)


def most_held_rows(kind: str, vocab_size: int, wide: torch.dtype = torch.float32) -> int:
    """Most rows whose logits are held under "auto", however much memory is free."""
    return max(most_rows(kind, vocab_size), MAX_HELD_BYTES[kind] // (vocab_size * wide.itemsize))


def may_hold(chunk_tokens: ChunkTokens, rows: int, vocab_size: int, like: Tensor, wide: torch.dtype) -> bool:
    """Whether the logits of so many rows may all exist at once."""
    if isinstance(chunk_tokens, ChunkBound):
        chunk_tokens = chunk_tokens.tokens
    if chunk_tokens != "auto":
        return rows <= chunk_tokens
    return rows <= min(most_held_rows(like.device.type, vocab_size, wide), _affordable_rows(vocab_size, like, wide))


def chunk_rows(chunk_tokens: ChunkTokens, rows: int, vocab_size: int, like: Tensor, wide: torch.dtype) -> int:
    """Rows per chunk: at most `chunk_tokens`. On a CPU evened out, so that the last chunk is not a stub; on CUDA a
    multiple of 128 where the bound allows it, which may be more than there are rows.

    "auto" asks the free memory of `like`'s device. Raises UserError for a bound below 1.
    """
    if isinstance(chunk_tokens, ChunkBound):
        chunk_tokens = chunk_tokens.tokens
    if chunk_tokens == "auto":
        affordable = _affordable_rows(vocab_size, like, wide)
        bound = max(MIN_CHUNK_TOKENS, min(most_rows(like.device.type, vocab_size), affordable))
    elif isinstance(chunk_tokens, int) and chunk_tokens >= 1:
        bound = chunk_tokens
    else:
        raise UserError(f"chunk_tokens {chunk_tokens!r}: give a number of tokens from 1, or 'auto'")
    if not rows:
        return 1
    multiple = CHUNK_MULTIPLE[like.device.type]
    if multiple == 1:
        return math.ceil(rows / math.ceil(rows / bound))
    if bound < multiple:
        return min(rows, bound)
    return min(math.ceil(rows / multiple), bound // multiple) * multiple


class Attempt:
    """One try of a whole pass, as a context that gives the rows per chunk. failed: memory ran out within it."""

    def __init__(self, chunk: int) -> None:
        self.chunk, self.failed = chunk, False

    def __enter__(self) -> int:
        return self.chunk

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        """Memory that runs out on a single row is the caller's to name."""
        self.failed = error is not None and self.chunk > 1 and is_out_of_memory(error)
        return self.failed


def attempts(
    chunk_tokens: ChunkTokens, rows: int, vocab_size: int, like: Tensor, wide: torch.dtype
) -> Iterator[Attempt]:
    """Tries of a whole pass: the first, and where memory runs out, one from its start with half of the rows per chunk.

        for attempt in attempts(…):
            with attempt as chunk: …

    So the result is that of the smaller chunk, and nothing is counted twice: a try undoes what an earlier one left, and
    lets go of its buffers. A `ChunkBound` stays at what it fell to.
    """
    bound = chunk_tokens if isinstance(chunk_tokens, ChunkBound) else ChunkBound(chunk_tokens)
    while True:
        attempt = Attempt(chunk_rows(bound, rows, vocab_size, like, wide))
        yield attempt
        if not attempt.failed:
            return
        bound.tokens, bound.halvings = attempt.chunk // 2, bound.halvings + 1
        if like.is_cuda:
            torch.cuda.empty_cache()


def _affordable_rows(vocab_size: int, like: Tensor, wide: torch.dtype) -> int:
    """Rows whose logits of both models take `FREE_SHARE` of the free memory."""
    width = row_width(like.device.type, vocab_size)
    bytes_per_row = 2 * width * wide.itemsize + (2 * width if like.is_cuda else 0)
    return int(FREE_SHARE * _free_bytes(like.device)) // bytes_per_row


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available
