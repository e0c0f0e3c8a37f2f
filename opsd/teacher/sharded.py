"""A teacher that no rank could hold alone: ZeRO-3 shards over the ranks that train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opsd.engine.deepspeed_engine import import_deepspeed
from opsd.model.checks import check_packing
from opsd.model.loading import disable_dropout, load_model
from opsd.model.scorer import Scorer
from opsd.teacher.base import Cache, cached, check_logit_settings
from opsd.types import MicroBatch


class ShardedTeacher:
    """Teacher whose weights are spread over the ranks, each layer gathered where it is needed.

    Every rank calls `hidden` with as many micro-batches. The head is whole on every rank: the loss needs it all along.
    offload: shards lie in host memory while no layer needs them.
    """

    def __init__(
        self, path: str, dtype: torch.dtype, device: torch.device, offload: bool, cache: Cache, trust: bool = False
    ) -> None:
        self._device = device
        self._cache: Cache = cache
        deepspeed = import_deepspeed(device)
        settings = _settings(dtype, offload)
        model = _load_in_shards(path, dtype, device, settings, trust)
        disable_dropout(model)
        check_logit_settings(model.config.to_dict(), path)
        self._scorer = Scorer(model, packed=True).eval().requires_grad_(False)
        deepspeed.initialize(model=self._scorer, config=settings)
        check_packing(self._scorer, f"--teacher {path}")
        with deepspeed.zero.GatheredParameters([self._scorer.head.weight]):
            self._head_VE = self._scorer.head.weight.detach().to(device, copy=True)

    @torch.no_grad()
    def hidden(self, batches: list[MicroBatch]) -> list[Tensor]:
        """See Teacher.hidden."""
        return [cached(self._scorer.hidden(micro.to(self._device)), self._cache) for micro in batches]

    def head(self) -> Tensor:
        """See Teacher.head."""
        return self._head_VE


def _load_in_shards(path: str, dtype: torch.dtype, device: torch.device, settings: dict[str, Any], trust: bool) -> Any:
    """The model, each weight spread out as soon as it is read: no rank ever holds the whole."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers loads in shards while this object lives.
    alive = HfDeepSpeedConfig(settings)
    model = load_model(path, "--teacher", dtype, device, trust)
    del alive
    return model


def _settings(dtype: torch.dtype, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # DeepSpeed wants a count; nothing is trained here.
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
