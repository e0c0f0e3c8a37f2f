"""What a teacher of few log-probabilities, or a single sampled token, is worth: against definitions in fp64."""

import pytest
import torch

from opsd.distill import distill_loss
from opsd.distill.top_log_probs import packed
from opsd.utils.errors import UserError

VOCAB, K = 23, 4


def bucketed(case, divergence, ids_NK, kept_NK):
    """The loss over K known tokens and one bucket for the others, in fp64, and its gradients, by autograd."""
    student_ND = case.student_ND.detach().double().requires_grad_()
    head_VD = case.student_head_VD.detach().double().requires_grad_()
    logp_NV = (student_ND @ head_VD.T).log_softmax(-1)
    logq_NV = (case.teacher_NE.double() @ case.teacher_head_VE.double().T).log_softmax(-1)

    def with_rest(log_NV):
        known_NK = log_NV.gather(1, ids_NK).masked_fill(~kept_NK, float("-inf"))
        rest_N1 = torch.log1p(-known_NK.exp().sum(1, keepdim=True))
        return torch.cat([log_NV.gather(1, ids_NK), rest_N1], 1)

    weight_NK = torch.cat([kept_NK, torch.ones(len(kept_NK), 1, dtype=torch.bool)], 1).double()
    logp, logq = with_rest(logp_NV), with_rest(logq_NV)
    terms = logp.exp() * (logp - logq) if divergence == "reverse_kl" else logq.exp() * (logq - logp)
    loss = (weight_NK * terms).sum()
    return loss.detach(), *torch.autograd.grad(loss, (student_ND, head_VD))


def known(case, ids_NK, kept_NK):
    """What a teacher of these log-probabilities gives."""
    logq_NV = (case.teacher_NE.double() @ case.teacher_head_VE.double().T).log_softmax(-1)
    return packed(ids_NK.masked_fill(~kept_NK, -1), logq_NV.gather(1, ids_NK).masked_fill(~kept_NK, 0.0))


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_few_log_probabilities_give_the_divergence_over_them_and_one_bucket(divergence, make_case, assert_close):
    case = make_case(17, VOCAB, spread=1.5)
    generator = torch.Generator().manual_seed(3)
    ids_NK = torch.stack([torch.randperm(VOCAB, generator=generator)[:K] for _ in range(17)])
    # Some places know less: one entry is always there.
    kept_NK = torch.rand(17, K, generator=generator) < 0.7
    kept_NK[:, 2] = True
    expected = bucketed(case, divergence, ids_NK, kept_NK)
    for chunk_tokens in (5, "auto"):
        how = {"divergence": divergence, "chunk_tokens": chunk_tokens}
        models = (case.student_ND, case.student_head_VD, known(case, ids_NK, kept_NK), None)
        loss = distill_loss(*models, **how).loss_sum
        found = (loss.detach(), *torch.autograd.grad(loss, (case.student_ND, case.student_head_VD)))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, *case.sums, size=10 * float(theirs.abs().max()))


@pytest.mark.numeric
def test_all_log_probabilities_give_the_exact_divergence(make_case, assert_close):
    case = make_case(9, VOCAB)
    ids_NK = torch.arange(VOCAB).expand(9, VOCAB)
    exact = case.gradients()
    models = (case.student_ND, case.student_head_VD, known(case, ids_NK, ids_NK >= 0), None)
    loss = distill_loss(*models).loss_sum
    assert_close(loss, exact[0], *case.sums)
    for ours, theirs in zip(torch.autograd.grad(loss, (case.student_ND, case.student_head_VD)), exact[1:], strict=True):
        assert_close(ours, theirs, *case.sums)


@pytest.mark.numeric
def test_what_is_known_beyond_the_vocabulary_is_cut_as_a_local_teachers_rows_are(make_case, assert_close):
    case = make_case(9, VOCAB)
    ids_NK = torch.arange(VOCAB).expand(9, VOCAB)
    local = case.loss(vocab_size=VOCAB - 3)
    models = (case.student_ND, case.student_head_VD, known(case, ids_NK, ids_NK >= 0), None)
    assert_close(distill_loss(*models, vocab_size=VOCAB - 3).loss_sum, local.loss_sum, *case.sums)


@pytest.mark.numeric
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_weighed_by_its_probability_every_sampled_token_together_gives_the_reverse_kl(
    temperature, make_case, assert_close
):
    # Each of five positions stands V times, once for each token that may be drawn there, weighed by its probability.
    case = make_case(5, VOCAB, spread=1.5, temperature=temperature)
    exact = case.gradients()
    p_NV = (case.student_ND @ case.student_head_VD.T / temperature).softmax(-1).detach()
    many = make_case(5, VOCAB, spread=1.5, temperature=temperature)
    many.student_ND = case.student_ND.detach().repeat_interleave(VOCAB, 0).requires_grad_()
    many.teacher_NE, many.student_head_VD = case.teacher_NE.repeat_interleave(VOCAB, 0), case.student_head_VD
    many.weight_N = p_NV.flatten()
    ids_N = torch.arange(VOCAB).repeat(5)
    loss, grad_MD, grad_VD = many.gradients(divergence="sampled_token", token_ids_N=ids_N)
    assert_close(loss, exact[0], *case.sums, VOCAB, size=3 * float(exact[0]))
    assert_close(grad_VD, exact[2], *case.sums, VOCAB, size=3 * float(exact[2].abs().max()))
    grad_ND = grad_MD.view(5, VOCAB, -1).sum(1)
    assert_close(grad_ND, exact[1], *case.sums, VOCAB, size=3 * float(exact[1].abs().max()))


@pytest.mark.numeric
@pytest.mark.parametrize("held", [True, pytest.param(False, marks=pytest.mark.e2e)])
def test_the_sampled_gradient_is_unbiased_for_the_reverse_kls(held, make_case):
    # 400 draws for each of 30 tokens: the mean gradient of the head is off by its standard error, not by more.
    draws, tokens = 400, 30
    case = make_case(tokens, VOCAB, spread=1.0)
    exact_VD = case.gradients()[2]
    p_NV = (case.student_ND @ case.student_head_VD.T).softmax(-1).detach()
    ids_ND = torch.multinomial(p_NV, draws, replacement=True, generator=torch.Generator().manual_seed(5))
    more = {"chunk_tokens": tokens if held else 7, "kept_N": torch.ones(tokens, dtype=torch.bool)}
    found = torch.stack(
        [case.gradients(divergence="sampled_token", token_ids_N=ids_ND[:, k], **more)[2] for k in range(draws)]
    ).double()
    error_VD = found.std(0) / draws**0.5
    # Of 184 numbers the largest of that many standard normals lies below four.
    assert ((found.mean(0) - exact_VD.double()).abs() <= 4.5 * error_VD).all()
    # It is a noisy one: a single draw is off by more than the gradient itself.
    assert float(found.std(0).norm()) > float(exact_VD.norm())


def test_the_sampled_token_objective_needs_the_tokens_and_the_fused_loss(make_case):
    case = make_case(3, VOCAB, divergence="sampled_token")
    with pytest.raises(UserError, match="give token_ids_N"):
        case.loss()
    with pytest.raises(UserError, match="memory 'whole' with sampled_token: give fused"):
        case.loss(token_ids_N=torch.zeros(3, dtype=torch.int64), memory="whole")
