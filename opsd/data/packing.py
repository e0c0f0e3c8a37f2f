"""Packs rollouts into micro-batches: the only place where positions are shifted by one.

Legend: L tokens of a packed row, N student tokens to train on (no prompt, no tool output, no padding); S sequences of a
micro-batch, R rows of a group of sequences, P positions of all padded groups together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opsd.types import MicroBatch, Rollout

# Sequences of a group are padded to its longest. A group may contain this much padding, in tokens or as a fraction of
# its positions, whichever is more: below that, another forward pass costs more than the padding that it saves.
PADDING_TOKENS = 256
PADDING_SHARE = 0.125


@dataclass(frozen=True)
class PaddedRows:
    """A micro-batch's sequences, one per row, padded on the right, in groups of about equal length.

    groups: int64 [R, longest] each; a sequence attends only to itself, and causal attention never reaches the padding.
    place_L: index of each token of the packed row among the P positions, all groups flattened and concatenated.
    """

    groups: list[torch.Tensor]
    place_L: torch.Tensor


def padded_rows(micro: MicroBatch) -> PaddedRows:
    """The micro-batch's sequences, longest first; see PaddedRows. Costs Σ length² of attention, a packed row L²."""
    ids_L, position_L = micro.input_ids_1L[0], micro.position_ids_1L[0]
    sequence_L = (position_L == 0).cumsum(0) - 1
    length_S = torch.bincount(sequence_L)
    order_S = length_S.argsort(descending=True, stable=True)
    shapes = _group_shapes(length_S[order_S].tolist())
    widths = torch.tensor([width for rows, width in shapes for _ in range(rows)], device=ids_L.device)
    start_S = torch.empty_like(length_S)
    start_S[order_S] = widths.cumsum(0) - widths
    place_L = start_S[sequence_L] + position_L
    ids_P = ids_L.new_zeros(sum(rows * width for rows, width in shapes))
    ids_P[place_L] = ids_L
    parts = ids_P.split([rows * width for rows, width in shapes])
    return PaddedRows([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], place_L)


def _group_shapes(lengths: list[int]) -> list[tuple[int, int]]:
    """(rows, width) of each group, for sequence lengths in descending order."""
    shapes: list[tuple[int, int]] = []
    padding = 0
    for length in lengths:
        if shapes:
            rows, width = shapes[-1]
            padding += width - length
            if padding <= max(PADDING_TOKENS, PADDING_SHARE * (rows + 1) * width):
                shapes[-1] = (rows + 1, width)
                continue
        shapes.append((1, length))
        padding = 0
    return shapes


def pack(rollouts: list[Rollout], max_tokens: int) -> list[MicroBatch]:
    """Pack rollouts into micro-batches of at most `max_tokens` tokens: first-fit, longest first.

    A rollout is never split: one longer than `max_tokens` gets a micro-batch of its own. Rollouts without
    student tokens have no loss and are left out. The result depends only on the rollouts. A micro-batch has one
    teacher; micro-batches are ordered by teacher.
    """
    teachers = sorted({rollout.prompt.teacher for rollout in rollouts})
    return [
        micro
        for name in teachers
        for micro in _pack([rollout for rollout in rollouts if rollout.prompt.teacher == name], max_tokens)
    ]


def _pack(rollouts: list[Rollout], max_tokens: int) -> list[MicroBatch]:
    bins: list[list[Rollout]] = []
    room: list[int] = []
    for rollout in sorted(rollouts, key=lambda r: (-_input_tokens(r), r.id)):
        if rollout.student_tokens() == 0:
            continue
        need = _input_tokens(rollout)
        place = next((i for i, free in enumerate(room) if free >= need), None)
        if place is None:
            bins.append([rollout])
            room.append(max_tokens - need)
        else:
            bins[place].append(rollout)
            room[place] -= need
    return [_join(sorted(members, key=lambda r: r.id)) for members in bins]


def share(batches: list[MicroBatch], rank: int, world_size: int) -> list[MicroBatch]:
    """A rank's part of a step's micro-batches: the same number for every rank, and about as many tokens.

    They are dealt out largest first, in alternating order of ranks. Ranks that get one fewer are given an empty one,
    because the ranks of a sharded engine run forward and backward together. With one rank nothing changes. Each of
    several teachers scores the same number on every rank.
    """
    if world_size == 1:
        return batches
    teachers = sorted({micro.teacher for micro in batches})
    return [
        micro
        for name in teachers
        for micro in _share([micro for micro in batches if micro.teacher == name], rank, world_size)
    ]


def _share(batches: list[MicroBatch], rank: int, world_size: int) -> list[MicroBatch]:
    order = sorted(range(len(batches)), key=lambda place: -batches[place].input_ids_1L.numel())
    rounds = [order[first : first + world_size] for first in range(0, len(order), world_size)]
    places = [rank if number % 2 == 0 else world_size - 1 - rank for number in range(len(rounds))]
    return [
        batches[dealt[place]] if place < len(dealt) else empty(batches[0].teacher)
        for dealt, place in zip(rounds, places, strict=True)
    ]


def empty(teacher: str = "") -> MicroBatch:
    """A micro-batch without student tokens: one input token, a loss of 0 and gradients of 0."""
    none = torch.zeros(0, dtype=torch.int64)
    one = torch.zeros(1, 1, dtype=torch.int64)
    return MicroBatch(one, one, none, none, none, teacher)


def for_teacher(micros: list[MicroBatch], rollouts: list[Rollout]) -> list[MicroBatch]:
    """The same student tokens in the same order, after the prompts that the teacher reads.

    rollouts: the step's. A micro-batch in which no prompt has `teacher_ids` is returned unchanged.
    """
    by_id = {rollout.id: rollout for rollout in rollouts}
    found = []
    for micro in micros:
        members = [by_id[number] for number in micro.rollout_N.unique().tolist()]
        own = any(rollout.prompt.teacher_ids is not None for rollout in members)
        found.append(_join(members, of_teacher=True) if own else micro)
    return found


def _input_tokens(rollout: Rollout) -> int:
    """Input tokens with the longer of the student's and the teacher's prompt. The last token is only predicted."""
    return rollout.prompt.tokens() + len(rollout.response_ids) - 1


def _join(rollouts: list[Rollout], of_teacher: bool = False) -> MicroBatch:
    ids, positions, rows, tokens, owners = [], [], [], [], []
    for rollout in rollouts:
        prompt_ids = (of_teacher and rollout.prompt.teacher_ids) or rollout.prompt.ids
        start, prompt_tokens = len(ids), len(prompt_ids)
        sequence = prompt_ids + rollout.response_ids
        ids += sequence[:-1]
        positions += range(len(sequence) - 1)
        for offset, (token, by_student) in enumerate(zip(rollout.response_ids, rollout.by_student, strict=True)):
            if by_student:
                # The hidden state of the previous token predicts this one: the shift by one.
                rows.append(start + prompt_tokens + offset - 1)
                tokens.append(token)
                owners.append(rollout.id)
    return MicroBatch(
        input_ids_1L=torch.tensor([ids]),
        position_ids_1L=torch.tensor([positions]),
        rows_N=torch.tensor(rows),
        token_ids_N=torch.tensor(tokens),
        rollout_N=torch.tensor(owners),
        teacher=rollouts[0].prompt.teacher,
    )
