"""The teacher: which model it is, where it runs, what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from opsd.config.settings import (
    FractionBelowOne,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
)
from opsd.utils.errors import UserError


@dataclass(frozen=True)
class TeacherConfig(Settings, part="teacher"):
    """The frozen model that scores every token."""

    model: Annotated[str, arg(name="")] = ""
    """Folder (or hub name) of the teacher; self: the student teaches itself. For several teachers use --teachers."""
    weights: Literal["initial", "ema", "current"] = "initial"
    """self: the student's starting weights (with adapters: the base model without them, at no extra memory), an
    exponential moving average of its weights in fp32, or its current weights."""
    ema: FractionBelowOne = 0.99
    """self, ema: at each refresh the average becomes ema times itself plus 1 - ema times the student."""
    every: PositiveInt = 1
    """self, ema or current: steps between refreshes."""
    context: str | None = None
    """A text file that replaces a prompt's last message for the teacher, so that it sees more than the student.
    {prompt}, {answer} and {any column} stand for the record's values, {rollout} for another sample of the same prompt
    and step that was rewarded (if there is none, the teacher reads the student's prompt)."""
    max_prompt_tokens: PositiveInt = 8192
    """With context: longest prompt of the teacher, in tokens. A prompt whose context is longer is dropped and counted;
    a {rollout} that would make it longer is not used."""
    kind: Literal["local", "vllm", "logprobs"] = "local"
    """local: in the training processes. vllm: served elsewhere (scripts/serve_teacher.sh). Both return hidden states,
    so the divergence is exact over the whole vocabulary. logprobs: any server that answers /v1/completions with
    prompt_logprobs (as vLLM does); only the teacher's tokenizer and config.json are needed here. It returns the
    likeliest tokens; all others form one bucket."""
    top_logprobs: PositiveInt = 20
    """logprobs: number of likeliest tokens requested per position, in addition to the sampled one. At most what the
    server allows (vLLM: --max-logprobs)."""
    shard: bool = False
    """local: shard its weights over the processes (ZeRO-3), for a teacher that does not fit on one GPU; needs
    engine.kind deepspeed."""
    offload: bool = False
    """local: keep the teacher in host memory except during its forward pass; its head stays on the device."""
    cache: Literal["device", "host"] = "device"
    """Where its hidden states are kept until the student's stage; host memory is pinned if there is a GPU."""
    urls: tuple[str, ...] = ("http://127.0.0.1:8000",)
    """vllm, logprobs: address of one or more replicas; with several teachers NAME=URL."""
    api_key_env: str | None = None
    """vllm, logprobs: the environment variable that holds the servers' key; the key is never written anywhere."""
    timeout_s: PositiveFloat = 300.0
    """vllm, logprobs: timeout of a request, in seconds."""
    retries: NonNegativeInt = 3
    """vllm, logprobs: how often a failed request is retried, each time on the next replica, before the run stops."""

    @property
    def is_student(self) -> bool:
        """Whether the student teaches itself."""
        return self.model == "self"

    @property
    def follows(self) -> bool:
        """Whether its weights change with the student's."""
        return self.is_student and self.weights != "initial"

    def check(self) -> None:
        if self.weights != "initial" and not self.is_student:
            raise UserError(f"--teacher.weights {self.weights} needs --teacher self, not {self.model}")
        if self.every > 1 and not self.follows:
            raise UserError(f"--teacher.every {self.every} needs --teacher self with --teacher.weights ema or current")
        if self.ema != TeacherConfig.ema and self.weights != "ema":
            raise UserError(f"--teacher.ema {self.ema} needs --teacher self with --teacher.weights ema")
        if self.follows and (self.kind != "local" or self.shard or self.offload):
            raise UserError(
                f"--teacher.weights {self.weights}: this teacher is part of the student and sharded with it; leave out "
                "--teacher.kind, --teacher.shard and --teacher.offload"
            )
        if self.kind != "local" and not self.urls:
            raise UserError("--teacher.urls names no server; give at least one, e.g. http://127.0.0.1:8000")
        if any(sign in url for url in self.urls for sign in "@?#"):
            raise UserError(
                "--teacher.urls holds a user, password or query, which would end up in config.json; give only the "
                "address, and with --teacher.api_key_env the name of the variable that holds the key"
            )
