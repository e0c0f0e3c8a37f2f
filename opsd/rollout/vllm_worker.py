"""A vLLM sampler as a separate process: `python -m opsd.rollout.vllm_worker N`, started by vllm_process.py.

N is an open socket that it inherits. Messages on it are bytes, never pickles: JSON requests and answers, and weights in
the safetensors format. The process ends when the socket is closed.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from opsd.rollout.vllm import VLLMSampler
from opsd.types import Sampling

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def main(socket: int) -> None:
    """Load the model that the first request names, then serve until the trainer closes the connection."""
    # Slurm and DeepSpeed's launcher send SIGTERM to every process of a run: the trainer saves, and needs its sampler.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        # If the trainer is killed, the GPU must become free, even if the sampler is in the middle of a batch.
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    with Connection(socket) as line:
        sampler = None
        while True:
            try:
                request = json.loads(line.recv_bytes())
            except EOFError:
                return
            try:
                if sampler is None:
                    sampler = VLLMSampler(device=torch.device(request.pop("device")), **request)
                    answer: Any = None
                else:
                    answer = _answer(sampler, request, line)
            except Exception as error:  # the trainer reports it and stops
                line.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
                return
            line.send_bytes(json.dumps({"answer": answer}).encode())


def _answer(sampler: VLLMSampler, request: dict[str, Any], line: Connection) -> Any:
    """The answer to a request: sample, score or load."""
    if request["do"] == "sample":
        jobs = [(number, ids) for number, ids in request["jobs"]]
        return sampler.sample(jobs, Sampling(**request["sampling"]), request["seed"])
    if request["do"] == "score":
        return sampler.score(request["ids"])
    return sampler.load(_weights(line))


def _weights(line: Connection) -> Iterator[tuple[str, Tensor]]:
    """The parameters in the order received, until an empty message."""
    while message := line.recv_bytes():
        yield from safetensors.torch.load(message).items()


if __name__ == "__main__":
    main(int(sys.argv[1]))
