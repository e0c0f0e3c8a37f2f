"""A teacher behind any server that gives log-probabilities of a prompt's tokens: the likeliest, and the sampled one.

Asked as vLLM's OpenAI-compatible server is: POST /v1/completions with token ids and `prompt_logprobs`. The exact
divergence over the whole vocabulary is lost (`opsd.distill.top_log_probs`); a pooling server keeps it.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from opsd.config import TeacherConfig
from opsd.distill.top_log_probs import packed
from opsd.teacher.vllm import ServedTeacher, split
from opsd.types import MicroBatch

# Below it a probability is nothing in fp32; a server may say -inf, which no sum survives.
LEAST = -1e4


class LogprobsTeacher(ServedTeacher):
    """Gives, in the place of hidden states, what `packed` makes of top_logprobs + 1 entries per token."""

    wanted = (
        "server with prompt_logprobs",
        "start one, e.g. `vllm serve`, and keep --teacher.top_logprobs within its --max-logprobs",
    )

    def __init__(self, config: TeacherConfig, device: torch.device, rank: int = 0) -> None:
        super().__init__(config, 2 * (config.top_logprobs + 1), torch.float32, device, rank)

    def head_for(self, micro: MicroBatch) -> None:
        """There is none."""

    def _sequences(self, micro: MicroBatch) -> list[list[int]]:
        """With the token that follows each: what is known of a token stands at its own place, not at the one before."""
        sampled = dict(zip(micro.rows_N.tolist(), micro.token_ids_N.tolist(), strict=True))
        found, end = [], 0
        for sequence in split(micro):
            end += len(sequence)
            # Behind a sequence that ends in a tool's words stands nothing that is read.
            found.append([*sequence, sampled.get(end - 1, sequence[-1])])
        return found

    def _asked(self, longest: int) -> int:
        """All of them, and one that the server writes."""
        return longest + 1

    def _states(self, url: str, sequences: list[list[int]]) -> list[Tensor]:
        """For each token of a sequence but the first, what was known of it."""
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
        """One token's entries in a row: ids, then log-probabilities; -1 and 0 fill what is left. own: its id."""
        if not known or str(own) not in known:
            raise ValueError(f"no log-probability of a prompt's token {own}")
        # A NaN fails too; rounding may put a certain token a little above 0.
        if wrong := [token for token, of in known.items() if not float(of["logprob"]) < 1e-2]:
            raise ValueError(f"{known[wrong[0]]['logprob']} as the log-probability of token {wrong[0]}")
        most = self._config.top_logprobs + 1
        pairs = [(int(token), max(LEAST, float(of["logprob"]))) for token, of in known.items()][:most]
        pairs += [(-1, 0.0)] * (most - len(pairs))
        ids, values = zip(*pairs, strict=True)
        return packed(torch.tensor([ids]), torch.tensor([values]))[0]
