"""A teacher behind any server that gives log-probabilities of a prompt's tokens: the likeliest, and the sampled one.

Requests are those of vLLM's OpenAI-compatible server: POST /v1/completions with token ids and `prompt_logprobs`. The
exact divergence over the whole vocabulary is lost (`opsd.distill.top_log_probs`); a pooling server keeps it.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from opsd.config import TeacherConfig
from opsd.distill.top_log_probs import packed
from opsd.teacher.vllm import ServedTeacher, split
from opsd.types import MicroBatch

# A log-probability below this is a probability of 0 in fp32; a server may return -inf, which would spoil sums.
LEAST = -1e4


class LogprobsTeacher(ServedTeacher):
    """Gives, in place of hidden states, top_logprobs + 1 entries per token, as `packed` stores them."""

    wanted = (
        "server with prompt_logprobs",
        "start one, e.g. `vllm serve`, and keep --teacher.top_logprobs within its --max-logprobs",
    )

    def __init__(self, config: TeacherConfig, device: torch.device, rank: int = 0) -> None:
        super().__init__(config, 2 * (config.top_logprobs + 1), torch.float32, device, rank)

    def head_for(self, micro: MicroBatch) -> None:
        """There is none."""

    def _sequences(self, micro: MicroBatch) -> list[list[int]]:
        """Each with the token that follows it: the server gives a token's log-probability at the token itself, not at
        the one before."""
        sampled = dict(zip(micro.rows_N.tolist(), micro.token_ids_N.tolist(), strict=True))
        found, end = [], 0
        for sequence in split(micro):
            end += len(sequence)
            # If a sequence ends with tool output, the entry after it is never read.
            found.append([*sequence, sampled.get(end - 1, sequence[-1])])
        return found

    def _asked(self, longest: int) -> int:
        """All of them, and one that the server generates."""
        return longest + 1

    def _states(self, url: str, sequences: list[list[int]]) -> list[Tensor]:
        """The entries of each token of a sequence but the first."""
        sequences = [sequence if len(sequence) > 1 else sequence * 2 for sequence in sequences]
        request = {
            "model": self._names[url],
            "prompt": sequences,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self._config.top_logprobs,
        }
        _, body = self._call(url, "/v1/completions", json.dumps(request).encode())
        choices = sorted(json.loads(body)["choices"], key=lambda choice: choice["index"])
        found = []
        for choice, sequence in zip(choices, sequences, strict=True):
            places = choice["prompt_logprobs"][1:]
            if len(places) != len(sequence) - 1:
                raise ValueError(f"log-probabilities of {len(places)} tokens for {len(sequence) - 1}")
            found.append(torch.stack([self._entry(*one) for one in zip(places, sequence[1:], strict=True)]))
        return found

    def _entry(self, known: dict[str, dict[str, float]], own: int) -> Tensor:
        """One token's entries as a row: ids, then log-probabilities, padded with -1 and 0. own: the token's id."""
        if not known or str(own) not in known:
            raise ValueError(f"no log-probability of a prompt's token {own}")
        # This also catches NaN; rounding may put the log-probability of a certain token slightly above 0.
        if wrong := [token for token, of in known.items() if not float(of["logprob"]) < 1e-2]:
            raise ValueError(f"{known[wrong[0]]['logprob']} as the log-probability of token {wrong[0]}")
        most = self._config.top_logprobs + 1
        pairs = [(int(token), max(LEAST, float(of["logprob"]))) for token, of in known.items()][:most]
        pairs += [(-1, 0.0)] * (most - len(pairs))
        ids, values = zip(*pairs, strict=True)
        return packed(torch.tensor([ids]), torch.tensor([values]))[0]
