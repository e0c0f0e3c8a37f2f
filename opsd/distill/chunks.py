"""How many tokens are processed at once."""

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
    """Maximum number of tokens whose logits exist at once: halved, for the rest of the run, when memory runs out.

    tokens: the current bound. halvings: how often it was halved.
    """

    tokens: int | Literal["auto"]
    halvings: int = 0


ChunkTokens = int | Literal["auto"] | ChunkBound

# "auto" takes this share of the free memory, within bounds: more rows gain nothing once the products run at full
# rate (the head's gradient is read and written once per chunk, which 256 rows hide well on a CPU).
FREE_SHARE = 0.25
MIN_CHUNK_TOKENS = 16
MAX_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
# If a chunk would have fewer logits than this (a small vocabulary), it gets more rows: call overhead would dominate.
SMALL_CHUNK_ENTRIES = 2**18
# Maximum bytes of one model's logits that are held for a second pass.
MAX_HELD_BYTES = {"cpu": 150 * 2**20, "cuda": 1200 * 2**20}
# Element-wise passes process a chunk in blocks of rows whose buffers take this many bytes: about what stays in a CPU's
# last-level cache between two passes; on CUDA, enough to fill the device.
BLOCK_BYTES = {"cpu": 12 * 2**20, "cuda": 512 * 2**20}
# Rows of logits are padded to a multiple of this many entries: tensor cores need rows that start at aligned addresses,
# and the vocabulary sizes of Qwen2.5 and Qwen3 are odd. `Projection.project_` fills the padding.
ROW_MULTIPLE = {"cpu": 1, "cuda": 64}
# If chunks have the same size in every micro-batch, CUDA's allocator can reuse their memory.
CHUNK_MULTIPLE = {"cpu": 1, "cuda": 128}


# Triton compiles the launchers of its kernels with one of these C compilers.
HAS_TRITON = importlib.util.find_spec("triton") is not None and bool(
    os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
)


def has_row_kernels(like: Tensor, wide: torch.dtype) -> bool:
    """Whether `triton_rows` does the element-wise work: on CUDA, for fp32 logits, if triton can run."""
    return HAS_TRITON and like.is_cuda and wide == torch.float32


def row_width(kind: str, vocab_size: int) -> int:
    """Entries of a row of logits in memory, on a device of this kind: the vocabulary, rounded up."""
    multiple = ROW_MULTIPLE[kind]
    return math.ceil(vocab_size / multiple) * multiple


def most_rows(kind: str, vocab_size: int) -> int:
    """Maximum rows of an "auto" chunk on a device of this kind, however much memory is free."""
    return max(MAX_CHUNK_TOKENS[kind], SMALL_CHUNK_ENTRIES // vocab_size)


def most_held_rows(kind: str, vocab_size: int, wide: torch.dtype = torch.float32) -> int:
    """Maximum number of rows whose logits are held under "auto", however much memory is free."""
    return max(most_rows(kind, vocab_size), MAX_HELD_BYTES[kind] // (vocab_size * wide.itemsize))


def may_hold(chunk_tokens: ChunkTokens, rows: int, vocab_size: int, like: Tensor, wide: torch.dtype) -> bool:
    """Whether the logits of `rows` rows may all exist at once."""
    if isinstance(chunk_tokens, ChunkBound):
        chunk_tokens = chunk_tokens.tokens
    if chunk_tokens != "auto":
        return rows <= chunk_tokens
    return rows <= min(most_held_rows(like.device.type, vocab_size, wide), _affordable_rows(vocab_size, like, wide))


def chunk_rows(chunk_tokens: ChunkTokens, rows: int, vocab_size: int, like: Tensor, wide: torch.dtype) -> int:
    """Rows per chunk: at most `chunk_tokens`. On a CPU all chunks are about equal, so that the last one is not tiny; on
    CUDA it is a multiple of 128 if the bound allows it, and may exceed `rows`.

    "auto" depends on the free memory of `like`'s device. Raises UserError for a bound below 1.
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
    """One attempt at a whole pass: a context manager that gives the rows per chunk. failed: it ran out of memory."""

    def __init__(self, chunk: int) -> None:
        self.chunk, self.failed = chunk, False

    def __enter__(self) -> int:
        return self.chunk

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        """Suppress running out of memory, except on a single row: that is raised to the caller."""
        self.failed = error is not None and self.chunk > 1 and is_out_of_memory(error)
        return self.failed


def attempts(
    chunk_tokens: ChunkTokens, rows: int, vocab_size: int, like: Tensor, wide: torch.dtype
) -> Iterator[Attempt]:
    """Attempts at a whole pass: after one that runs out of memory, another from the start with half the rows per chunk.

        for attempt in attempts(…):
            with attempt as chunk: …

    The result is that of the last attempt. So that nothing is counted twice, the caller's `with` block must first reset
    what a failed attempt left, and free its buffers. A `ChunkBound` keeps the lower value.
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
