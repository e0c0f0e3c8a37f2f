"""A causal language model that gives hidden states, and the one module that projects them to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from opsd.data.packing import padded_rows
from opsd.model.attention import compute_dtype, has_varlen_attention, in_one_row
from opsd.types import MicroBatch

Result = TypeVar("Result")
HeadUse = Callable[[torch.Tensor, torch.Tensor], Result]


class DistillHead(nn.Module):
    """The vocabulary projection, as a module that owns the head's own Parameter (tied or not).

    Called with hidden states alone it is the linear layer that it replaces, so `generate` and `save_pretrained`
    go on as before. Called with `use` it hands (hidden_ND, head_VD) to it and returns what it returns: the loss is
    formed within this module's forward, where a sharding engine has the whole weight gathered.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor, use: HeadUse[Any] | None = None) -> Any:
        """Logits [..., V], or use(hidden, head): hidden in the compute type, the head as it is.

        Under autocast, which stays on, the loss core rounds the head for its products alone: the head's gradient
        reaches the Parameter in fp32, as it was summed. The core keeps logits in fp32 by itself.
        """
        if use is None:
            return functional.linear(hidden, self.weight)
        # The layers are done: copies of their weights that autocast has made, and that no gradient needs, make room.
        torch.clear_autocast_cache()
        return use(hidden.to(compute_dtype(hidden)), self.weight)


class Scorer(nn.Module):
    """A causal language model that gives hidden states at the rows of a micro-batch, never all logits.

    packed: a micro-batch is one call of the model on one row, as it must be where ranks have to call it equally often
    (ZeRO-3). Otherwise every sequence has a row of its own, in as many calls as there are groups of about equal length
    (`padded_rows`): a mask over a packed row would cost its length squared. Attention of variable length
    needs no mask and always gets the packed row.
    """

    def __init__(self, model: PreTrainedModel, packed: bool = False) -> None:
        super().__init__()
        self.model = model
        self.packed = packed or has_varlen_attention(model)
        self.model.set_output_embeddings(DistillHead(head_of(model).weight))

    @property
    def head(self) -> DistillHead:
        """The model's projection to logits."""
        return head_of(self.model)

    def forward(self, micro: MicroBatch, use: HeadUse[Result]) -> Result:
        """use(hidden_ND, head_VD), with the final hidden states that predict the micro-batch's student tokens."""
        return self.head(self.hidden(micro), use)

    def hidden(self, micro: MicroBatch) -> torch.Tensor:
        """Final hidden states [N, D], after the last norm, each predicting one student token.

        The cache must stay off: with it, packed sequences silently attend to each other.
        """
        base = self.model.base_model
        if self.packed:
            row = {"input_ids": micro.input_ids_1L, "position_ids": micro.position_ids_1L}
            out = in_one_row(base, micro.lengths, **row, use_cache=False)
            return out.last_hidden_state[0].index_select(0, micro.rows_N)
        rows = padded_rows(micro)
        hidden = [base(input_ids=ids_RL, use_cache=False).last_hidden_state.flatten(0, 1) for ids_RL in rows.groups]
        return torch.cat(hidden).index_select(0, rows.place_L[micro.rows_N])


def head_of(model: PreTrainedModel) -> Any:
    """The module that projects to logits; every causal language model has one."""
    return model.get_output_embeddings()
