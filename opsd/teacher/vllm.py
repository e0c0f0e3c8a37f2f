"""A teacher served by vLLM: final hidden states over HTTP, so that the loss keeps the exact whole-vocabulary KL.

The server is a vLLM pooling engine (scripts/serve_teacher.sh); servers of log-probabilities give only the top few.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from opsd.config import TeacherConfig
from opsd.model.checks import Reach
from opsd.model.loading import load_ends, running
from opsd.model.positions import check_positions, rope_switch
from opsd.model.scorer import DistillHead
from opsd.model.transform import find_transform
from opsd.teacher.base import Teacher
from opsd.types import Head, MicroBatch
from opsd.utils.errors import RunStopped, UserError, first_line
from opsd.utils.going_on import advice

# Maximum sequences per request: the answer's header lists each, and HTTP libraries limit headers to 64 KiB.
SEQUENCES_PER_REQUEST = 64
BACKOFF_S = 0.5
# Errors raised for a missing, incomplete or malformed answer.
_NO_ANSWER = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError)


class ServedTeacher(Teacher):
    """Teacher on one or more replicas of a server: sends requests, retries them, and puts the answers in order.

    width, dtype: of its output per token. Requests rotate over the replicas; one that fails is retried on the next,
    config.retries times, then the run stops.
    """

    # The kind of server that must answer, and how to start one.
    wanted: ClassVar[tuple[str, str]]

    def __init__(
        self, config: TeacherConfig, width: int, dtype: torch.dtype, device: torch.device, rank: int = 0
    ) -> None:
        self._config, self._width, self._dtype, self._rank = config, width, dtype, rank
        # Where the states are kept until the student's turn.
        self._waits = device if config.cache == "device" else torch.device("cpu")
        self._key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        # Use no proxy: the teacher is on the local network.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._pool = ThreadPoolExecutor(2 * len(config.urls))
        self._names: dict[str, str] = {}

    def connect(self, longest: int = 0) -> None:
        """Ask every replica what it serves, and for the states of one token. Raises UserError if that fails.

        longest: tokens of the longest sequence that it will have to score.
        """
        for url in self._config.urls:
            try:
                card = json.loads(self._call(url, "/v1/models", None)[1])["data"][0]
                self._names[url], most = card["id"], card.get("max_model_len")
                (states,) = self._states(url, [[0]])
            except _NO_ANSWER as error:
                raise UserError(
                    f"--teacher.urls {url}: no {self.wanted[0]} answers there ({self._reason(error)}); {self.wanted[1]}"
                ) from error
            if isinstance(most, int) and self._asked(longest) > most:
                raise UserError(
                    f"--teacher.urls {url}: it takes {most} tokens, but the run's longest sequence may have {longest}; "
                    "start it with a larger --max-model-len"
                )
            if states.shape[1] != self._width:
                raise UserError(
                    f"--teacher.urls {url}: it returns {states.shape[1]} numbers per token, but the head of --teacher "
                    f"{self._config.model} takes {self._width}; serve that model"
                )

    def hidden(self, batches: list[MicroBatch]) -> list[Tensor]:
        """See Teacher. Raises RunStopped if no replica answers."""
        return list(self._pool.map(self._of_batch, range(len(batches)), batches))

    @abstractmethod
    def _states(self, url: str, sequences: list[list[int]]) -> list[Tensor]:
        """[L, width] of each sequence of L tokens, on the CPU."""

    def _sequences(self, micro: MicroBatch) -> list[list[int]]:
        """The sequences to send for a micro-batch; the server returns the states of its L tokens."""
        return split(micro)

    def _asked(self, longest: int) -> int:
        """Tokens that a server must accept for a sequence of `longest` tokens: the last one is never sent."""
        return longest - 1

    def _of_batch(self, place: int, micro: MicroBatch) -> Tensor:
        if not micro.student_tokens():
            return torch.zeros(0, self._width, dtype=self._dtype, device=self._waits)
        sequences = self._sequences(micro)
        rows = []
        for first in range(0, len(sequences), SEQUENCES_PER_REQUEST):
            rows += self._with_retries(place, sequences[first : first + SEQUENCES_PER_REQUEST])
        return torch.cat(rows).index_select(0, micro.rows_N).to(self._waits, self._dtype)

    def _with_retries(self, place: int, sequences: list[list[int]]) -> list[Tensor]:
        urls = self._config.urls
        last: Exception | None = None
        for attempt in range(self._config.retries + 1):
            url = urls[(self._rank + place + attempt) % len(urls)]
            try:
                states = self._states(url, sequences)
                if any(state.shape[1] != self._width for state in states):
                    raise ValueError(f"an answer of another width than {self._width}")
                return states
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    # A refused request would be refused again.
                    raise RunStopped(f"the teacher at {url} refuses a request: {self._reason(error)}") from error
                last = error
            except _NO_ANSWER as error:
                last = error
            if attempt < self._config.retries:
                time.sleep(BACKOFF_S * 2**attempt)
        assert last is not None
        raise RunStopped(
            f"the teacher does not answer: {self._config.retries + 1} tries over {', '.join(urls)}, the last ended "
            f"with {self._reason(last)}; restart it, then {advice()}"
        ) from last

    def _call(self, url: str, path: str, body: bytes | None) -> tuple[Any, bytes]:
        request = urllib.request.Request(url.rstrip("/") + path, body, {"Content-Type": "application/json"})
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        with self._opener.open(request, timeout=self._config.timeout_s) as answer:
            return answer.headers, answer.read()

    def _reason(self, error: Exception) -> str:
        """What went wrong, in one line; never the key, which a server's answer may repeat."""
        if isinstance(error, urllib.error.HTTPError):
            said = error.read(4096).decode(errors="replace")
            if self._key:
                said = said.replace(self._key, "(the key)")
            return " ".join(["status", str(error.code), *said[:300].split()])
        return first_line(error)


class VLLMTeacher(ServedTeacher):
    """A vLLM pooling server. head: its projection, read from the model folder."""

    wanted = ("pooling server", "start one with scripts/serve_teacher.sh")

    def __init__(self, config: TeacherConfig, head: Head, device: torch.device, rank: int = 0) -> None:
        super().__init__(config, head.weight_VD.shape[1], head.weight_VD.dtype, device, rank)
        self._head = head.changed(lambda part: part.to(device))

    def head_for(self, micro: MicroBatch) -> Head:
        return self._head

    def _states(self, url: str, sequences: list[list[int]]) -> list[Tensor]:
        """Final hidden states [L, E] of each sequence, on the CPU."""
        kind = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[self._dtype]
        request = {
            "model": self._names[url],
            "input": sequences,
            "task": "token_embed",
            "encoding_format": "bytes",
            "embed_dtype": kind,
        }
        header, body = self._call(url, "/pooling", json.dumps(request).encode())
        whole = bytearray(body)
        found = []
        for part, sequence in zip(json.loads(header["metadata"])["data"], sequences, strict=True):
            flat = torch.frombuffer(whole, dtype=self._dtype, offset=part["start"], count=_count(part))
            if part["shape"][0] != len(sequence):
                raise ValueError(f"{part['shape'][0]} states for {len(sequence)} tokens")
            found.append(flat.view(part["shape"]))
        return found


def split(micro: MicroBatch) -> list[list[int]]:
    """The sequences that a packed micro-batch holds."""
    return [ids.tolist() for ids in micro.input_ids_1L[0].split(micro.lengths)]


def read_head(path: str, dtype: torch.dtype, trust: bool = False, reach: Reach | None = None) -> Head:
    """The head of the served model and its transform, read without the model's layers.

    It is the head that vLLM uses for the folder, dequantised; if head and embeddings are tied, the embeddings. Raises
    UserError if the folder is incomplete, or if its model's logits are not hidden·head.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"--teacher {path}: no config.json there; give the folder of the model that is served")
    model = load_ends(path, "--teacher", dtype, trust)
    reach = reach or Reach()
    check_positions(model.config, reach.spans, f"--teacher {path}")
    if (switch := rope_switch(model.config)) is not None and reach.longest > switch:
        raise UserError(
            f"--teacher {path}: its rotary embeddings change beyond {switch} tokens, but vLLM changes them at every "
            "length; give --teacher.kind local"
        )
    with running(f"--teacher {path}"):
        transform = find_transform(model, f"--teacher {path}")
    return DistillHead.of(model, transform).as_head().changed(Tensor.detach)


def _count(part: dict[str, Any]) -> int:
    rows, width = part["shape"]
    return rows * width
