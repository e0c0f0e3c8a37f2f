"""Rollouts by vLLM in separate processes: the trainer sends prompts and new weights, and checks the answers."""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from opsd.config import RolloutConfig
from opsd.engine import Engine
from opsd.model.files import in_pieces
from opsd.rollout.base import RolloutEngine, jobs_of
from opsd.rollout.probe import Probe
from opsd.rollout.vllm import INSTEAD, rollouts_of
from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.distributed import Ranks, before_leaving
from opsd.utils.errors import RunStopped, said
from opsd.utils.going_on import advice

Value = TypeVar("Value")
# Size of the weights that are sent at once: the trainer never holds more than this in addition to its own.
BUCKET_BYTES = 256 * 2**20
PROGRAM = ("-m", "opsd.rollout.vllm_worker")
# With these variables of the trainer's launcher, the sampler would join the trainer's process group.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
             "MASTER_PORT")  # fmt: skip


class Sampler:
    """One sampler process and the connection to it. settings: VLLMSampler's arguments as JSON values.

    Every failure, including a time-out, ends the process and raises RunStopped with one line.
    """

    def __init__(self, settings: dict[str, Any], gpus: str, timeout_s: float) -> None:
        self._timeout_s, self._sent = timeout_s, True
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        self._line, theirs = Pipe()
        # A process that stops in the middle of a message must not block the trainer's sends or receives for ever.
        with socket.socket(fileno=os.dup(self._line.fileno())) as line:
            for direction in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                line.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", math.ceil(timeout_s), 0))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                # Ctrl-C must reach only the trainer: it saves, and needs its sampler until then.
                start_new_session=True,
            )
        atexit.register(self.close)
        self.send(settings)

    def send(self, request: dict[str, Any]) -> None:
        """Send a request; `answer` returns its answer."""
        self.send_bytes(json.dumps(request).encode())

    def send_bytes(self, message: bytes) -> None:
        """Send a message unchanged. If it fails, the next `answer` reports that."""
        if self._sent:
            try:
                self._line.send_bytes(message)
            except OSError:
                self._sent = False

    def answer(self) -> Any:
        """The next answer. Raises RunStopped if the sampler failed, died, or did not answer in time."""
        try:
            if self._process.poll() is None and not (self._sent and self._line.poll(self._timeout_s)):
                raise TimeoutError
            message = json.loads(self._line.recv_bytes())
        except (TimeoutError, BlockingIOError):
            self.close()
            raise RunStopped(
                f"the sampler process gave no answer in {self._timeout_s:g} s (--rollout.timeout_s) and was ended"
            ) from None
        except (EOFError, OSError):
            raise RunStopped(f"the sampler process ended with exit code {self._process.wait()}") from None
        except ValueError as error:
            self._refuse(str(error))
        if not isinstance(message, dict) or message.keys().isdisjoint(("answer", "error")):
            self._refuse("neither an answer nor an error")
        if "error" in message:
            self.close()
            raise RunStopped(f"the sampler process failed ({str(message['error']).splitlines()[0]})")
        return message["answer"]

    def rollouts(self, count: int, vocab_size: int) -> list[list[int]]:
        """The answer to a request for `count` rollouts: token ids below `vocab_size`."""
        found = self._list(count, list, "rollouts")
        if not all(isinstance(token, int) and 0 <= token < vocab_size for ids in found for token in ids):
            self._refuse(f"a token that is not one of 0 to {vocab_size - 1}")
        return found

    def nats(self, count: int) -> list[float]:
        """The answer to a request for `count` log-probabilities."""
        return self._list(count, float, "log-probabilities")

    def _list(self, count: int, kind: type, what: str) -> list[Any]:
        found = self.answer()
        if not (isinstance(found, list) and len(found) == count and all(isinstance(one, kind) for one in found)):
            self._refuse(f"{count} {what} were requested")
        return found

    def _refuse(self, why: str) -> NoReturn:
        self.close()
        raise RunStopped(f"the sampler process gave an invalid answer ({why})")

    def close(self) -> None:
        """End the process. No answer is expected any more."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


class VLLMProcessRollout(RolloutEngine):
    """RolloutEngine over `rollout.samplers` processes that the first rank starts; see RolloutConfig.

    settings: VLLMSampler's arguments as JSON values, for the model folder that `engine`'s student was loaded from. A
    failure on the first rank is raised on every rank. Steps stay on-policy: samplers are idle while the student is
    trained.
    """

    def __init__(self, engine: Engine, rollout: RolloutConfig, settings: dict[str, Any]) -> None:
        path, dtype = settings["path"], settings["dtype"]
        self._engine, self._ranks, self._dtype = engine, engine.ranks, getattr(torch, dtype)
        self._probe = Probe(engine, dtype, rollout.probe_tolerance, settings["max_model_tokens"])
        self._samplers: list[Sampler] = []
        path = str(Path(path).resolve()) if Path(path).exists() else path
        settings = {**settings, "path": path, "device": engine.device.type}
        self._eos_ids, self._vocab_size = settings["eos_ids"], settings["vocab_size"]
        gpus = rollout.sampler_gpus.split(",") if rollout.sampler_gpus else [""] * rollout.samplers
        before_leaving(self._close)

        def start() -> None:
            for number in range(rollout.samplers):
                self._samplers.append(Sampler(settings, gpus[number], rollout.timeout_s))
            for sampler in self._samplers:
                sampler.answer()

        self._on_main(start)
        if in_pieces(engine.student.model):
            with said(f"--rollout.engine vllm_process: it cannot reload the weights of {path}", INSTEAD):
                self._load_weights()
                self._probe.try_out(self._scores, self._vocab_size)

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:

        def ask() -> list[tuple[int, list[int]]]:
            shares = [jobs_of(prompts, samples, Ranks(number, count)) for number in range(count)]
            for sampler, jobs in zip(self._samplers, shares, strict=True):
                numbered = [(number, prompt.ids) for number, prompt in jobs]
                how = dataclasses.asdict(sampling)
                sampler.send({"do": "sample", "jobs": numbered, "sampling": how, "seed": seed})
            written: list[tuple[int, list[int]]] = []
            for sampler, jobs in zip(self._samplers, shares, strict=True):
                found = sampler.rollouts(len(jobs), self._vocab_size)
                written += [(number, ids) for (number, _), ids in zip(jobs, found, strict=True)]
            return written

        count = len(self._samplers)
        answers = dict(self._on_main(ask))
        jobs = jobs_of(prompts, samples, Ranks())
        rollouts = rollouts_of(jobs, [answers[number] for number, _ in jobs], self._eos_ids, sampling)
        self._probe.take(rollouts, self._scores)
        return rollouts

    def sync(self) -> None:
        """See RolloutEngine. Goes bucket by bucket, so that the trainer has no second full copy.

        Raises RunStopped, on every rank, if a sampler and the trainer then disagree on a probe.
        """
        self._load_weights()
        self._probe.check(self._scores)

    def _load_weights(self) -> None:
        for sampler in self._samplers:
            sampler.send({"do": "load"})
        bucket: dict[str, Tensor] = {}
        size = 0
        # Gathering is collective: all ranks must go through all weights, even if a sampler fails.
        for name, tensor in self._engine.gathered():
            if not self._ranks.is_main:
                continue
            bucket[name] = tensor.detach().to("cpu", self._dtype, copy=True).contiguous()
            size += bucket[name].nbytes
            if size >= BUCKET_BYTES:
                self._send_weights(bucket)
                bucket, size = {}, 0
        if self._ranks.is_main:
            self._send_weights(bucket)
            for sampler in self._samplers:
                sampler.send_bytes(b"")
        self._on_main(lambda: [sampler.answer() for sampler in self._samplers])

    def _send_weights(self, bucket: dict[str, Tensor]) -> None:
        if bucket:
            message = safetensors.torch.save(bucket)
            for sampler in self._samplers:
                sampler.send_bytes(message)

    def _scores(self, ids: list[int]) -> list[list[float]]:
        """Every sampler's log-probabilities of a probe."""

        def score() -> list[list[float]]:
            for sampler in self._samplers:
                sampler.send({"do": "score", "ids": ids})
            return [sampler.nats(len(ids) - 1) for sampler in self._samplers]

        return self._on_main(score)

    def _on_main(self, act: Callable[[], Value]) -> Value:
        """Run `act` on the first rank; all ranks return its value, or raise its RunStopped."""
        value, problem = None, None
        if self._ranks.is_main:
            try:
                value = act()
            except RunStopped as stop:
                problem = str(stop)
        value, problem = self._ranks.broadcast((value, problem))
        if problem is not None:
            self._close()
            raise RunStopped(f"{problem}; {advice()}")
        return value  # pyrefly: ignore[bad-return]

    def _close(self) -> None:
        for sampler in self._samplers:
            sampler.close()
