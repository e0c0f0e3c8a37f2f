"""The processes of a run: one without a launcher, several under torchrun or deepspeed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from opsd.utils.errors import UserError
from opsd.utils.going_on import advice

Value = TypeVar("Value")
# The store through which ranks meet, and in which the first rank to fail is recorded.
_store: Any = None
_closers: list[Callable[[], None]] = []
_wait_s = 0.0
_ANSWER_S = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process among world_size. Every method but `is_main` is called on all ranks, in the same order."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes files and prints."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks; values are small: numbers, names, token ids."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """The first rank's value."""
        return self.gather(value)[0]

    def sum(self, value: float) -> float:
        """The sum of every rank's value, in fp64."""
        return sum(self.gather(value))

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor, summed over the ranks."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def concatenate(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows, in the order of ranks; their numbers may differ and may be 0."""
        if self.world_size == 1:
            return rows
        # Sent as bytes, so that any dtype works, padded to the longest rank's.
        flat = rows.contiguous().view(-1).view(torch.uint8)
        counts = self.gather(flat.numel())
        padded = flat.new_zeros(max(counts))
        padded[: flat.numel()] = flat
        pieces = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(pieces, padded)
        whole = torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
        return whole.view(rows.dtype).view(-1, *rows.shape[1:])


ONE_RANK = Ranks()


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device, wait_s: float = 1800.0) -> Ranks:
    """Join the other processes of the run. device: where tensors that they exchange may be, besides the CPU.

    wait_s: how long a process waits for the others before it gives up, in seconds.
    """
    global _store, _wait_s
    _wait_s = wait_s
    if world_size() == 1:
        # A launcher would set this; DeepSpeed reads it.
        os.environ.setdefault("LOCAL_RANK", "0")
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if world_size() == 1:
            _store, rank, size = distributed.HashStore(), 0, 1
        else:
            _store, rank, size = _meet()
        group_store = distributed.PrefixStore("opsd", _store)
        limit = timedelta(seconds=wait_s)
        # For the groups that DeepSpeed and vLLM make without a limit; torch's default is 10 or 30 minutes.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
        distributed.init_process_group(backend, timeout=limit, store=group_store, rank=rank, world_size=size)
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def _meet() -> tuple[Any, int, int]:
    """The launcher's store, this process's rank and the number of ranks."""
    try:
        return next(rendezvous("env://"))
    except distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']}, the rendezvous of this run's ranks, is taken, perhaps by another "
            "run on this machine; give the launcher another one (--master_port)"
        ) from None


def before_leaving(close: Callable[[], None]) -> None:
    """Have `leave` call `close`, for anything that uses the ranks' process group and must end before it."""
    _closers.append(close)


def leave() -> None:
    """Leave the process group, at the end of a successful run."""
    while _closers:
        _closers.pop()()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def first_to_fail(or_left: bool) -> bool:
    """Whether this rank should report the error: the other ranks fail because of it, and would only repeat it.

    Before the ranks have joined, all of them read the same command line, so the first one reports for all.
    or_left: rank 1 reports if the first rank, which keeps the store, has ended or hangs and may not have reported.
    """
    if _store is None or world_size() == 1:
        return int(os.environ.get("RANK", "0")) == 0
    answers: list[int] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(_store.add("failures", 1))

    # torchrun keeps its own store; under DeepSpeed's launcher the first rank keeps it. If that rank has ended, asking
    # fails; if it hangs, asking takes for ever.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_S)
    return answers[0] == 1 if answers else or_left and os.environ.get("RANK") == "1"


def contact_lost(error: Exception) -> str | None:
    """The message for an error of the process group: another process has ended, or did not respond in time; or None."""
    text = str(error)
    if not (isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)):
        return None
    late = "imed out" in text or "imeout" in text
    what = f"did not respond within {_wait_s:g} s (--engine.wait_s)" if late else "has ended"
    return f"another process of the run {what}: look for its own message, then {advice()}"


def local_device(name: str, flag: str = "--engine.device") -> torch.device:
    """This process's device for auto, cpu or cuda. Raises UserError for cuda if there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{flag} cuda: PyTorch finds no CUDA device here; give cpu, or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)
