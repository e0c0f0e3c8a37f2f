"""A causal language model that gives hidden states, and the one module that projects them to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opsd.data.packing import padded_rows
from opsd.model.attention import compute_dtype, has_varlen_attention, in_one_row
from opsd.types import PLAIN, Head, MicroBatch, Transform

Result = TypeVar("Result")
HeadUse = Callable[[torch.Tensor, Head], Result]


class DistillHead(nn.Module):
    """The vocabulary projection, as a module that owns the head's own Parameters (tied or not).

    Called with hidden states alone it is the linear layer that it replaces, so `generate` and `save_pretrained`
    work as before. Called with `use` it returns use(hidden_ND, head): the loss is
    computed within this module's forward, where a sharding engine has gathered the whole weights. transform: what the
    model does to the layer's output.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, transform: Transform = PLAIN) -> None:
        super().__init__()
        self.weight, self.transform = weight, transform
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, model: PreTrainedModel, transform: Transform = PLAIN) -> DistillHead:
        """A DistillHead that owns the parameters of a model's head."""
        head = head_of(model)
        return cls(head.weight, getattr(head, "bias", None), transform)

    def as_head(self) -> Head:
        """This head as a `Head`, in the Parameters' own type."""
        return Head(self.weight, self.bias, self.transform)

    def forward(self, hidden: torch.Tensor, use: HeadUse[Any] | None = None) -> Any:
        """The layer's output [..., V], or use(hidden, head): hidden in the compute type, the head as it is.

        Under autocast, which stays on, the loss core rounds the head only for its products: the head's gradient
        reaches the Parameter in fp32, as it was summed. The core itself keeps logits in fp32.
        """
        if use is None:
            return functional.linear(hidden, self.weight, self.bias)
        # The layers are done: free autocast's copies of their weights, unless a gradient needs them.
        torch.clear_autocast_cache()
        return use(hidden.to(compute_dtype(hidden)), self.as_head())


class Scorer(nn.Module):
    """A causal language model that gives hidden states at the rows of a micro-batch, never all logits.

    packed: a micro-batch is one call of the model on one row; needed if all ranks must make the same number of calls
    (ZeRO-3). Otherwise every sequence has a row of its own, with one call per group of about equal length
    (`padded_rows`): a mask over a packed row would cost its length squared. Variable-length attention
    needs no mask and always gets the packed row. alone: one call per sequence, for models in which sequences of one
    call affect each other. transform: from `transform.find_transform`.
    """

    def __init__(self, model: PreTrainedModel, packed: bool = False, transform: Transform = PLAIN) -> None:
        super().__init__()
        self.model = model
        self.packed, self.alone = packed or has_varlen_attention(model), False
        self.model.set_output_embeddings(DistillHead.of(model, transform))

    @property
    def head(self) -> DistillHead:
        """The model's projection to logits."""
        return head_of(self.model)

    @property
    def layout(self) -> str:
        """The layout of a micro-batch's sequences: packed, padded or alone."""
        return "alone" if self.alone else "packed" if self.packed else "padded"

    def train(self, mode: bool = True) -> Scorer:
        """Training mode, which computes the same values as evaluation: no dropout, no router noise.

        Only layers that can recompute their activations in backward are set to it: they do so in training mode alone.
        """
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return self

    def forward(self, micro: MicroBatch, use: HeadUse[Result]) -> Result:
        """use(hidden_ND, head), with the final hidden states that predict the micro-batch's student tokens."""
        return self.head(self.hidden(micro), use)

    def hidden(self, micro: MicroBatch) -> torch.Tensor:
        """Final hidden states [N, D], after the last norm, each predicting one student token.

        The cache must stay off: with it, packed sequences silently attend to each other.
        """
        if self.alone:
            alone = [self.hidden_alone(ids_L) for ids_L in micro.input_ids_1L[0].split(micro.lengths)]
            return torch.cat(alone).index_select(0, micro.rows_N)
        base = body_of(self.model)
        if self.packed:
            row = {"input_ids": micro.input_ids_1L, "position_ids": micro.position_ids_1L}
            out = in_one_row(base, micro.lengths, **row, use_cache=False)
            return out.last_hidden_state[0].index_select(0, micro.rows_N)
        rows = padded_rows(micro)
        hidden = [base(input_ids=ids_RL, use_cache=False).last_hidden_state.flatten(0, 1) for ids_RL in rows.groups]
        return torch.cat(hidden).index_select(0, rows.place_L[micro.rows_N])

    def hidden_alone(self, ids_L: torch.Tensor) -> torch.Tensor:
        """Final hidden states [L, D] of one sequence in a call of its own."""
        return body_of(self.model)(input_ids=ids_L[None], use_cache=False).last_hidden_state[0]


def body_of(model: PreTrainedModel) -> Any:
    """The model without its head, which gives final hidden states."""
    base: Any = model.base_model
    if base is model:
        # Some models' base_model_prefix names no part of theirs.
        base = next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)
    return base


def head_of(model: PreTrainedModel) -> Any:
    """The module that projects to logits; every causal language model has one."""
    return model.get_output_embeddings()
