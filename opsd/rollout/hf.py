"""Rollouts by transformers' generate, on the very weights that are trained: nothing to keep in step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from opsd.prompts import Prompt
from opsd.rollout.base import Rollout, Sampling
from opsd.seeding import derive_seed, seeded


class HFRollout:
    """RolloutEngine on a transformers model.

    model: a causal language model; it is put into eval mode while sampling. batch_rollouts: rollouts
    generated side by side. autocast: context manager factory for the compute type.
    Draws depend on (seed, place of the batch) alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        batch_rollouts: int,
        autocast: Any = contextlib.nullcontext,
    ) -> None:
        self._model, self._batch_rollouts, self._autocast = model, batch_rollouts, autocast
        self._eos_ids = eos_token_ids(model, tokenizer)
        # Padding is masked and cut off, so any id does.
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(self._eos_ids), 0)

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See RolloutEngine.generate. Prompts of like length go together, so that little is padded."""
        jobs = [(number * samples + k, prompt) for number, prompt in enumerate(prompts) for k in range(samples)]
        jobs.sort(key=lambda job: (len(job[1].ids), job[0]))
        rollouts: list[Rollout] = []
        with self._sampling_mode(sampling) as config:
            for first in range(0, len(jobs), self._batch_rollouts):
                batch = jobs[first : first + self._batch_rollouts]
                with seeded(derive_seed(seed, "generate", first), self._model.device):
                    rollouts += self._generate_batch(batch, config, sampling.max_new_tokens)
        return sorted(rollouts, key=lambda rollout: rollout.id)

    def sync(self) -> None:
        """Nothing to do: the sampler and the trainer share their weights."""

    @torch.no_grad()
    def _generate_batch(
        self, batch: list[tuple[int, Prompt]], config: GenerationConfig, max_new_tokens: int
    ) -> list[Rollout]:
        width = max(len(prompt.ids) for _, prompt in batch)
        ids_BL = torch.full((len(batch), width), self._pad_id)
        mask_BL = torch.zeros_like(ids_BL)
        for row, (_, prompt) in enumerate(batch):
            ids_BL[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask_BL[row, width - len(prompt.ids) :] = 1
        device = self._model.device
        with self._autocast():
            out_BL = self._model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), generation_config=config
            )
        responses = out_BL[:, width:].tolist()
        return [
            Rollout(number, prompt, *cut_at_eos(response, self._eos_ids, max_new_tokens))
            for (number, prompt), response in zip(batch, responses, strict=True)
        ]

    @contextlib.contextmanager
    def _sampling_mode(self, sampling: Sampling) -> Iterator[GenerationConfig]:
        """Eval mode, and a generation config of our own: nothing is inherited from the model's folder."""
        model, was_training, inherited = self._model, self._model.training, self._model.generation_config
        greedy = sampling.temperature == 0
        config = GenerationConfig(
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._eos_ids or None,
            pad_token_id=self._pad_id,
            use_cache=True,
        )
        model.generation_config = GenerationConfig()
        model.eval()
        try:
            yield config
        finally:
            model.generation_config = inherited
            model.train(was_training)


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the model's generation config may name several (Llama 3, Qwen)."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [named] if isinstance(named, int) else list(named or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


def cut_at_eos(response: list[int], eos_ids: list[int], max_new_tokens: int) -> tuple[list[int], bool]:
    """The ids up to and with the first EOS, and whether the length limit came first.

    What stands behind EOS is padding, even where padding has EOS's own id.
    """
    for place, token in enumerate(response):
        if token in eos_ids:
            return response[: place + 1], False
    return response[:max_new_tokens], True
