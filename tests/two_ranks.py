"""Several ranks on this machine: a program that makes them of itself, and how it does."""

import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from opsd.engine.deepspeed_engine import import_deepspeed
from opsd.utils.distributed import leave


def run_ranks(program: Path, *args: Path | str) -> subprocess.CompletedProcess[str]:
    """A program that calls `on_ranks`; each rank has one thread."""
    # An engine in this process may have set what launchers set.
    own = {name: value for name, value in os.environ.items() if name not in place(0, 1, 0)}
    environment = {**own, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    words = [sys.executable, str(program), *map(str, args)]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment that a launcher gives one of so many ranks."""
    number, count = str(rank), str(ranks)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {**meet, "RANK": number, "LOCAL_RANK": number}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_ranks(count: int, act: Callable[[], None]) -> None:
    """`act` on so many forks of this process; exits with 1 where one fails, which ends the others."""
    import_deepspeed(torch.device("cpu"))
    # What every engine asks for, and with it torch's compiler.
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    # DeepSpeed collects garbage as it builds an engine: among what was imported, which stays, it need not look.
    gc.freeze()
    port, running = free_port(), set()
    for rank in range(count):
        if not (pid := os.fork()):
            be_rank(place(rank, count, port), act)
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def be_rank(environment: dict[str, str], act: Callable[[], None]) -> None:
    """Never returns: the fork ends with what it did."""
    code = 1
    try:
        os.environ |= environment
        act()
        leave()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
