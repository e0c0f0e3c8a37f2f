"""Rollouts by transformers' generate, on the very weights that are trained: nothing to keep in step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from opsd.prompts import Prompt
from opsd.ranks import ONE_RANK, Ranks
from opsd.rollout.base import Rollout, Sampling, gather_rollouts, jobs_of
from opsd.rollout.draws import DrawByRollout, processors, vocabulary_size


class HFRollout:
    """RolloutEngine on a transformers model.

    model: a causal language model; it is put into eval mode while sampling. batch_rollouts: rollouts
    generated side by side. context: within it the model generates (compute type, gathered weights); it is entered
    on every rank, with or without work. Draws depend on (seed, rollout id) alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        batch_rollouts: int,
        context: Any = contextlib.nullcontext,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self._model, self._batch_rollouts, self._context, self._ranks = model, batch_rollouts, context, ranks
        self._eos_ids = eos_token_ids(model.generation_config, tokenizer)
        self._vocab_size = vocabulary_size(tokenizer)
        # Padding is masked and cut off, so any id does.
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(self._eos_ids), 0)

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See RolloutEngine.generate. Prompts of like length go together, so that little is padded."""
        jobs = jobs_of(prompts, samples, self._ranks)
        jobs.sort(key=lambda job: (len(job[1].ids), job[0]))
        rollouts: list[Rollout] = []
        with self._sampling_mode() as config, self._context():
            config.max_new_tokens = sampling.max_new_tokens
            for first in range(0, len(jobs), self._batch_rollouts):
                rollouts += self._generate_batch(jobs[first : first + self._batch_rollouts], config, sampling, seed)
        return gather_rollouts(rollouts, self._ranks)

    def sync(self) -> None:
        """Nothing to do: the sampler and the trainer share their weights."""

    @torch.no_grad()
    def _generate_batch(
        self, batch: list[tuple[int, Prompt]], config: GenerationConfig, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        width = max(len(prompt.ids) for _, prompt in batch)
        ids_BL = torch.full((len(batch), width), self._pad_id)
        mask_BL = torch.zeros_like(ids_BL)
        for row, (_, prompt) in enumerate(batch):
            ids_BL[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask_BL[row, width - len(prompt.ids) :] = 1
        device = self._model.device
        draw = DrawByRollout(seed, [number for number, _ in batch], sampling.max_new_tokens, width)
        out_BL = self._model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids_BL.to(device),
            attention_mask=mask_BL.to(device),
            generation_config=config,
            logits_processor=processors(sampling, self._vocab_size, draw),
            synced_gpus=False,
        )
        responses = out_BL[:, width:].tolist()
        return [
            Rollout(number, prompt, *cut_at_eos(response, self._eos_ids, sampling.max_new_tokens))
            for (number, prompt), response in zip(batch, responses, strict=True)
        ]

    @contextlib.contextmanager
    def _sampling_mode(self) -> Iterator[GenerationConfig]:
        """Eval mode, and a generation config of our own: nothing is inherited from the model's folder."""
        model, was_training, inherited = self._model, self._model.training, self._model.generation_config
        config = GenerationConfig(
            # Drawing is ours, rollout by rollout: see DrawByRollout.
            do_sample=False,
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


def eos_token_ids(generation: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """Every id that ends a response: a model's generation config may name several (Llama 3, Qwen)."""
    named = None if generation is None else generation.eos_token_id
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
