"""Two models that end with different tokens: the loss and the statistics take these for one token, exactly."""

import dataclasses
import math

import pytest
import torch
from tolerance import close

from opsd.distill.inputs import LossSpec, check_inputs
from opsd.distill.loss import distill
from opsd.distill.select import Choice
from opsd.distill.stats import build_stats, check_needs, score_rows
from opsd.selection import ALL_STATISTICS, load_selector
from opsd.types import Head, Stops, Transform
from opsd.utils.errors import UserError

VOCAB, TOKENS, STOPS = 11, 7, Stops((3, 8, 0), joined=True)


def models(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        (leaf(TOKENS, 5) * 2).requires_grad_(),
        leaf(VOCAB, 5).requires_grad_(),
        leaf(TOKENS, 4) * 2,
        leaf(VOCAB, 4),
    )


def naive(student_ND, head_VD, teacher_NE, teacher_head_VE, temperature):
    """Both models' log-probabilities over the vocabulary with the stops summed up into a class of their own, last."""
    others = [token for token in range(VOCAB) if token not in STOPS.ids]

    def classes(hidden, head):
        p_NV = (hidden @ head.T / temperature).softmax(-1)
        return torch.cat([p_NV[:, others], p_NV[:, list(STOPS.ids)].sum(-1, keepdim=True)], -1).log()

    return classes(student_ND, head_VD), classes(teacher_NE, teacher_head_VE)


def divergence_of(name, log_p, log_q, beta=0.5):
    p, q = log_p.exp(), log_q.exp()
    if name == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)


@pytest.mark.numeric
@pytest.mark.parametrize("memory", ["fused", "whole"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradients_are_those_of_the_vocabulary_with_one_stop(memory, divergence, temperature):
    given = models()
    spec = LossSpec(divergence, 0.5, temperature, 3, memory)
    weight_N = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)
    inputs = check_inputs(*given, weight_N=weight_N, stops=STOPS, temperature=temperature)
    found = distill(inputs, Choice(), spec).loss_sum
    expected = (weight_N * divergence_of(divergence, *naive(*given, temperature))).sum()
    close(found.item(), expected.item(), 5, VOCAB, TOKENS, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, given[:2]), torch.autograd.grad(expected, given[:2]), strict=True
    ):
        close(ours, theirs, 5, VOCAB, TOKENS, dtype=torch.float64)


@pytest.mark.numeric
@pytest.mark.parametrize("memory", ["fused", "whole"])
def test_a_head_with_bias_and_scale_is_joined_behind_both(memory):
    student_ND, head_VD, teacher_NE, teacher_head_VE = models()
    bias_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    heads = Head(head_VD, bias_V, Transform(0.4)), Head(teacher_head_VE, bias_V.detach() / 2, Transform(1.7))
    inputs = check_inputs(student_ND, heads[0], teacher_NE, heads[1], stops=STOPS, temperature=0.8)
    spec = LossSpec(temperature=0.8, memory=memory)
    found = distill(inputs, Choice(), spec)
    others = [token for token in range(VOCAB) if token not in STOPS.ids]
    p_NC, q_NC = (
        torch.cat([p_NV[:, others], p_NV[:, list(STOPS.ids)].sum(-1, keepdim=True)], -1)
        for p_NV in (
            (head.logits(x) / 0.8).softmax(-1) for head, x in zip(heads, (student_ND, teacher_NE), strict=True)
        )
    )
    expected = (p_NC * (p_NC.log() - q_NC.log())).sum()
    close(found.loss_sum.item(), expected.item(), 5, VOCAB, TOKENS, dtype=torch.float64)
    leaves = student_ND, head_VD, bias_V
    for ours, theirs in zip(
        torch.autograd.grad(found.loss_sum, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        close(ours, theirs, 5, VOCAB, TOKENS, dtype=torch.float64)
    scored = score_rows(inputs, frozenset({"stop_log_prob_N", "teacher_stop_log_prob_N"}), spec)
    close(scored["stop_log_prob_N"], p_NC[:, -1].log().detach(), 5, VOCAB)
    close(scored["teacher_stop_log_prob_N"], q_NC[:, -1].log().detach(), 5, VOCAB)


def test_a_soft_cap_is_not_joined():
    student_ND, head_VD, teacher_NE, teacher_head_VE = models()
    with pytest.raises(UserError, match="a head with a soft cap has no logit for joined stops"):
        check_inputs(student_ND, Head(head_VD, None, Transform(1.0, 5.0)), teacher_NE, teacher_head_VE, stops=STOPS)


@pytest.mark.numeric
@pytest.mark.parametrize("chunk", ["auto", 2])
def test_a_selector_that_reads_held_logits_trains_on_the_same_loss(chunk):
    given = models()
    spec = LossSpec(chunk_tokens=chunk)
    inputs = check_inputs(*given, stops=STOPS)
    result = distill(inputs, Choice(load_selector("soft_or", retention=0.5)), spec)
    log_p, log_q = naive(*given, 1.0)
    expected = divergence_of("reverse_kl", log_p, log_q)[result.kept_N].sum()
    assert 0 < int(result.kept_N.sum()) < TOKENS
    close(result.loss_sum.item(), expected.item(), 5, VOCAB, TOKENS, dtype=torch.float64)
    (ours,) = torch.autograd.grad(result.loss_sum, given[:1])
    (theirs,) = torch.autograd.grad(expected, given[:1])
    close(ours, theirs, 5, VOCAB, TOKENS, dtype=torch.float64)


@pytest.mark.numeric
@pytest.mark.parametrize("joined", [True, False])
def test_statistics_are_those_of_the_same_vocabulary(joined):
    given = models()
    stops = dataclasses.replace(STOPS, joined=joined)
    ids_N = torch.tensor([1, 8, 3, 0, 5, 2, 8])
    inputs = check_inputs(*given, token_ids_N=ids_N, stops=stops)
    stats = build_stats(inputs, score_rows(inputs, check_needs(frozenset(ALL_STATISTICS), inputs), LossSpec()))
    assert stats.stop_N is not None
    assert stats.stop_N.tolist() == [False, True, True, True, False, False, True]
    assert torch.equal(stats.token_ids_N, ids_N)
    log_p, log_q = naive(*(value.detach() for value in given), 1.0)
    # The chance to end is the sum over the stops, joined or not.
    close(stats.stop_log_prob_N, log_p[:, -1], 5, VOCAB)
    close(stats.teacher_stop_log_prob_N, log_q[:, -1], 4, VOCAB)
    if joined:
        close(stats.entropy_N, -(log_p.exp() * log_p).sum(-1), 5, VOCAB)
        close(stats.reverse_kl_N, divergence_of("reverse_kl", log_p, log_q), 5, VOCAB)
        # A stop is ranked as the one class that it stands in.
        stop_rank_N = (log_q[:, :-1] > log_q[:, -1:]).sum(-1)
        assert torch.equal(stats.teacher_rank_N[stats.stop_N], stop_rank_N[stats.stop_N])


def test_a_stop_that_both_find_certain_costs_nothing_though_they_write_it_differently():
    """By hand: the student ends with token 0, the teacher with token 1, each with a chance of 1 − e⁻²⁰ or so.

    Apart, KL(P_S‖P_T) is about 20 nats; joined, both give the one stop all the chance there is.
    """
    student_ND, teacher_NE = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([[0.0, 20.0, 0.0]])
    head = torch.eye(3)

    def loss(stops):
        inputs = check_inputs(student_ND, head, teacher_NE, head, stops=stops)
        return distill(inputs, Choice(), LossSpec()).loss_sum.item()

    assert abs(loss(Stops((0, 1))) - 20.0) < 1e-3
    assert loss(Stops((0, 1), joined=True)) < 1e-6


def test_what_is_wrong_about_ending_is_still_taught():
    """By hand: three tokens of even chance, of which two are stops; the teacher never ends: P_S(end) = 2/3.

    With P_T = (e⁻²⁰, e⁻²⁰, 1) nearly: KL = 2/3·ln(2/3 / 2e⁻²⁰) + 1/3·ln(1/3).
    """
    head = torch.eye(3)
    student_ND = torch.zeros(1, 3, requires_grad=True)
    inputs = check_inputs(student_ND, head, torch.tensor([[-20.0, -20.0, 0.0]]), head, stops=Stops((0, 1), True))
    loss = distill(inputs, Choice(), LossSpec()).loss_sum
    assert abs(loss.item() - (2 / 3 * (math.log(1 / 3) + 20) + 1 / 3 * math.log(1 / 3))) < 1e-4
    (grad_ND,) = torch.autograd.grad(loss, student_ND)
    # Both stops lose alike, the other token gains what they lose.
    assert grad_ND[0, 0] == grad_ND[0, 1] > 0
    assert abs(float(grad_ND.sum())) < 1e-5


def test_stops_that_agree_change_no_bit():
    given = models(torch.float32)
    plain = distill(check_inputs(*given), Choice(), LossSpec()).loss_sum
    agreed = distill(check_inputs(*given, stops=Stops((3, 8))), Choice(), LossSpec()).loss_sum
    assert torch.equal(plain, agreed)
    for ours, theirs in zip(torch.autograd.grad(agreed, given[:2]), torch.autograd.grad(plain, given[:2]), strict=True):
        assert torch.equal(ours, theirs)


def test_the_chance_of_ending_needs_to_know_the_stops():
    with pytest.raises(UserError, match="stop_log_prob_N needs to know which tokens end a turn"):
        check_needs(frozenset({"stop_log_prob_N"}), check_inputs(*models()))


def stats_of(stop_N):
    inputs = check_inputs(*models(), token_ids_N=torch.tensor([3 if stop else 1 for stop in stop_N]), stops=Stops((3,)))
    return inputs, torch.tensor(stop_N)


@pytest.mark.parametrize(("how", "by_hand"), [("as_scored", None), ("always", True), ("never", False)])
@pytest.mark.parametrize("rule", [None, "entropy", "soft_or"])
def test_the_stop_is_kept_as_the_setting_says_and_nothing_else_changes(how, by_hand, rule):
    inputs, stop_N = stats_of([False, False, True, False, False, False, True])
    selector = None if rule is None else load_selector(rule, retention=0.3)
    plain = distill(inputs, Choice(selector), LossSpec()).kept_N
    found = distill(inputs, Choice(selector, stop_token=how), LossSpec()).kept_N
    assert torch.equal(found[~stop_N], plain[~stop_N])
    assert torch.equal(found[stop_N], plain[stop_N] if by_hand is None else torch.full((2,), by_hand))
