"""The teacher in this process: frozen, in eval mode, and its hidden states are the model's own."""

import pytest
import torch
from tolerance import close, transformer

from opsd.data.packing import empty, pack
from opsd.model.scorer import Scorer
from opsd.teacher import LocalTeacher

CPU = torch.device("cpu")


@pytest.mark.numeric
def test_hidden_states_projected_by_the_head_are_the_models_own_logits(make_model, make_rollout):
    # two micro-batches of one rollout each; every row is compared with the model run on that rollout alone
    model = make_model("llama", tied=False, seed=1)
    teacher = LocalTeacher(Scorer(make_model("llama", tied=False, seed=1)), CPU)
    rollouts = [make_rollout(0, [6, 7, 8], [9, 10, 1]), make_rollout(1, [11], [12, 13])]
    batches = pack(rollouts, 5)
    hidden = teacher.hidden(batches)
    assert [states.shape for states in hidden] == [(3, 16), (2, 16)]
    for rollout, states_NE in zip(rollouts, hidden, strict=True):
        with torch.no_grad():
            logits_LV = model(torch.tensor([rollout.prompt.ids + rollout.response_ids])).logits[0]
        expected_NV = logits_LV[len(rollout.prompt.ids) - 1 : -1]
        close(states_NE @ teacher.head_for(empty()).weight_VD.T, expected_NV, *transformer(2, 16))


def test_the_teacher_is_frozen_and_keeps_no_graph(make_model, make_rollout):
    scorer = Scorer(make_model()).train()
    teacher = LocalTeacher(scorer, CPU)
    (hidden,) = teacher.hidden(pack([make_rollout(0, [6], [7, 8])], 100))
    assert not scorer.training
    assert not any(parameter.requires_grad for parameter in scorer.parameters())
    assert not hidden.requires_grad
    assert not teacher.head_for(empty()).weight_VD.requires_grad


def test_no_batches_give_no_states(make_model):
    assert LocalTeacher(Scorer(make_model()), CPU).hidden([]) == []
