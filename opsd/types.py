"""What travels through a step: prompts, how answers are sampled, rollouts, micro-batches, heads.

Legend: L tokens of a packed row, N student tokens to train on (no prompt, no tool output, no padding), V rows of a
head, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class Prompt:
    """One prompt. id: the record's own id, or its place in the file. ids: token ids. answer: gold, or None.

    teacher_ids: what the teacher reads in place of ids; None: the same. teacher_asked: the text or messages from which
    teacher_ids are rendered once a sample of the student is filled in (`opsd.data.context`); None if they need no
    sample. teacher: name of the teacher that scores it, if there are several.
    """

    id: str
    text: str
    ids: list[int]
    answer: str | None
    teacher_ids: list[int] | None = field(default=None, kw_only=True)
    teacher_asked: str | list[dict[str, Any]] | None = field(default=None, kw_only=True)
    teacher: str = field(default="", kw_only=True)

    def content(self) -> list[Any]:
        """Everything that determines how it is asked and graded, as JSON values."""
        own = [value for value in (self.teacher_ids, self.teacher_asked, self.teacher or None) if value is not None]
        return [self.id, self.ids, self.answer, *own]

    def tokens(self) -> int:
        """Length of the student's prompt or the teacher's, whichever is longer."""
        return max(len(self.ids), len(self.teacher_ids or ()))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off. max_new_tokens: tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 8192

    @classmethod
    def of(cls, settings: Any, max_new_tokens: int) -> Sampling:
        """As `opsd.config.settings.SamplingSettings` say."""
        return cls(settings.temperature, settings.top_p, settings.top_k, max_new_tokens)


@dataclass(frozen=True)
class Stops:
    """The tokens that end a response, or a turn of it.

    joined: the loss treats them as one token, because the two models end with different ones.
    """

    ids: tuple[int, ...] = ()
    joined: bool = False


# No token is known to end a turn.
NO_STOPS = Stops()


@dataclass(frozen=True)
class Rollout:
    """One answer of the student, as token ids from the sampler (never re-tokenised).

    id: unique over the step and all ranks. response_ids: end with a stop (see `Stops`) unless truncated.
    student_mask: for each response token, True where the student wrote it (False: tool output);
    None means all True. truncated: the length limit came before a stop.
    """

    id: int
    prompt: Prompt
    response_ids: list[int]
    truncated: bool
    student_mask: list[bool] | None = field(default=None)

    @property
    def by_student(self) -> list[bool]:
        """For each response token whether the student wrote it."""
        return [True] * len(self.response_ids) if self.student_mask is None else self.student_mask

    def student_tokens(self) -> int:
        """How many response tokens the student wrote."""
        return sum(self.by_student)


@dataclass(frozen=True)
class MicroBatch:
    """Several whole rollouts in one row, without padding; attention stays within each by its positions.

    input_ids_1L, position_ids_1L: int64 [1, L]; positions restart at 0 with every rollout.
    rows_N: index in L of the hidden state that predicts the n-th student token.
    token_ids_N: that token. rollout_N: its rollout's id. teacher: name of the teacher that scores all of them, if there
    are several.
    """

    input_ids_1L: torch.Tensor
    position_ids_1L: torch.Tensor
    rows_N: torch.Tensor
    token_ids_N: torch.Tensor
    rollout_N: torch.Tensor
    teacher: str = ""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved = replace(self, **tensors)
        vars(moved)["lengths"] = self.lengths
        return moved

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, in the row's order. `to` copies them, so that a device is not waited for."""
        (start_S,) = (self.position_ids_1L[0] == 0).nonzero(as_tuple=True)
        ends = [*start_S.tolist()[1:], self.position_ids_1L.shape[1]]
        return [end - start for start, end in zip(start_S.tolist(), ends, strict=True)]

    def student_tokens(self) -> int:
        """How many tokens are trained on, N."""
        return self.rows_N.numel()


@dataclass(frozen=True)
class Transform:
    """What a model does to x = hidden·headᵀ + bias: logits = cap(scale·x), cap(y) = softcap·tanh(y / softcap).

    scale: above 0. softcap: above 0, or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Logits from x, of any shape; autograd differentiates it."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


PLAIN = Transform()


@dataclass(frozen=True, eq=False)
class Head:
    """How a model computes logits from final hidden states: weight_VD, bias_V (or None), then the transform."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    transform: Transform = PLAIN

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Head:
        """The same with `change`, e.g. `torch.Tensor.detach`, applied to its tensors."""
        return Head(change(self.weight_VD), None if self.bias_V is None else change(self.bias_V), self.transform)

    def logits(self, hidden_ND: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """The model's own logits [N, V] at once, differentiable. rows: compute only so many first columns of V."""
        bias_V = None if self.bias_V is None else self.bias_V[:rows]
        return self.transform(torch.nn.functional.linear(hidden_ND, self.weight_VD[:rows], bias_V))
