"""A teacher that is too large for one rank: ZeRO-3 shards over the ranks that train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from opsd.engine.deepspeed_engine import import_deepspeed
from opsd.model.checks import Reach, check_causal, check_packing
from opsd.model.loading import check_whole, disable_dropout, load_model, running
from opsd.model.positions import check_positions
from opsd.model.scorer import Scorer
from opsd.model.transform import check_head_alone, transform_of
from opsd.teacher.base import Cache, Teacher, cached
from opsd.types import Head, MicroBatch
from opsd.utils.errors import UserError


class ShardedTeacher(Teacher):
    """Teacher whose weights are sharded over the ranks, each layer gathered when it is needed.

    All ranks call `hidden` with the same number of micro-batches. The head is whole on every rank, for the loss.
    offload: shards are in host memory while no layer needs them.
    """

    def __init__(
        self,
        path: str,
        dtype: torch.dtype,
        device: torch.device,
        offload: bool,
        cache: Cache,
        trust: bool = False,
        reach: Reach | None = None,
    ) -> None:
        self._device = device
        self._cache: Cache = cache
        deepspeed = import_deepspeed(device)
        settings, name = _settings(dtype, offload), f"--teacher {path}"
        # When it loads in shards, transformers does not report weights that the model has no place for.
        if not check_whole(path, "--teacher", trust):
            raise UserError(
                f"{name}: its weights are quantised and cannot be sharded; give a folder with unquantised ones"
            )
        model = _load_in_shards(path, dtype, device, settings, trust)
        disable_dropout(model)
        with running(name):
            head: Any = model.get_output_embeddings()
            with deepspeed.zero.GatheredParameters(list(head.parameters())):
                check_head_alone(head, name)
            self._scorer = Scorer(model, packed=True).eval().requires_grad_(False)
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    # Keep a layer whole while it runs: some read another module's weight (Mamba its convolution's).
                    deepspeed.utils.set_z3_leaf_module(layer, True)
            deepspeed.initialize(model=self._scorer, config=settings)
            self._scorer.head.transform = transform_of(model, name)
            check_causal(self._scorer, name)
            check_packing(self._scorer, name, reach)
        check_positions(model.config, (reach or Reach()).spans, name)
        with deepspeed.zero.GatheredParameters(list(self._scorer.head.parameters())):
            self._head = self._scorer.head.as_head().changed(lambda part: part.detach().to(device, copy=True))

    @torch.no_grad()
    def hidden(self, batches: list[MicroBatch]) -> list[Tensor]:
        return [cached(self._scorer.hidden(micro.to(self._device)), self._cache) for micro in batches]

    def head_for(self, micro: MicroBatch) -> Head:
        return self._head


def _load_in_shards(path: str, dtype: torch.dtype, device: torch.device, settings: dict[str, Any], trust: bool) -> Any:
    """The model, each weight sharded as soon as it is read: no rank ever holds all of them."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers loads in shards while this object exists.
    alive = HfDeepSpeedConfig(settings)
    model = load_model(path, "--teacher", dtype, device, trust)
    del alive
    return model


def _settings(dtype: torch.dtype, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # DeepSpeed requires a count; nothing is trained here.
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
