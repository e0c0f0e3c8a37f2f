"""Logits at the edge: equal models, vanishing probabilities, huge values."""

import math

import pytest
import torch

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
MEMORIES = ("fused", "whole")


def logits_case(make_case, student, teacher, **rest):
    """A case whose logits are the given rows: hidden states that are the rows, heads that are the identity."""
    student, teacher = torch.tensor(student), torch.tensor(teacher)
    case = make_case(len(student), student.shape[1], width=student.shape[1], teacher_width=student.shape[1], **rest)
    case.student_ND, case.teacher_NE = student.requires_grad_(), teacher
    case.student_head_VD = torch.eye(student.shape[1]).requires_grad_()
    case.teacher_head_VE = torch.eye(student.shape[1])
    return case


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("spread", [3.0, 1000.0])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(divergence, spread, make_case, assert_close):
    case = make_case(20, 501, spread=spread, divergence=divergence, beta=0.3)
    case.teacher_NE, case.teacher_head_VE = case.student_ND.detach(), case.student_head_VD.detach()
    loss_sum, grad_ND, grad_VD = case.gradients(chunk_tokens=6)
    if divergence == "jsd":
        # Its closed form adds the mixture's entropy H(β) = 0.61 nats and subtracts it again: fp32 rounding remains.
        assert float(loss_sum) >= 0.0
        assert_close(loss_sum, torch.tensor(0.0), *case.sums, size=20 * 0.61, cancels=True)
        assert_close(grad_ND, torch.zeros_like(grad_ND), *case.sums, size=0.61, cancels=True)
        assert_close(grad_VD, torch.zeros_like(grad_VD), *case.sums, size=0.61 * spread, cancels=True)
    else:
        assert float(loss_sum) == 0.0
        assert not grad_ND.any()
        assert not grad_VD.any()


@pytest.mark.numeric
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_gives_the_students_mode_1e_30_stays_finite(divergence, memory, make_case, naive, assert_close):
    # The student is sure of token 0 (p = 1 − 2·e^-20); the teacher gives it 1e-30.
    far = math.log(1e-30)
    case = logits_case(
        make_case, [[20.0, 0.0, 0.0]], [[far, math.log(0.5), math.log(0.5)]], divergence=divergence, beta=0.3
    )
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients(memory=memory)
    nats = {
        "reverse_kl": -far,  # 69.08 nats, less what the student gives elsewhere
        "forward_kl": 20.0 - math.log(2.0),  # Σ q·(log q − log p) = log ½ − (−20)
        "jsd": -0.3 * math.log(0.3) - 0.7 * math.log(0.7),  # disjoint: the mixture's entropy, its largest value
    }
    assert_close(loss_sum, nats[divergence], *case.sums)
    assert_close(loss_sum, expected.loss_sum, *case.sums)
    # The gradient on a sure student is a difference of two numbers near 69 nats, or of two shares of 1; the head's has
    # hidden states of 20 as a factor.
    size = 69.0 if divergence == "reverse_kl" else 1.0
    assert_close(grad_ND, expected.grad_ND, *case.sums, size=size, cancels=divergence != "forward_kl")
    assert_close(grad_VD, expected.grad_VD, *case.sums, size=20.0 * size, cancels=divergence != "forward_kl")


@pytest.mark.numeric
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logits_of_ten_thousand_stay_finite(divergence, memory, temperature, make_case, naive, assert_close):
    student = [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 9_990.0], [-1e4, 1e4, 1e4], [1e4, -1e4, -1e4]]
    teacher = [[-1e4, 1e4, 0.0], [1e4, 1e4, 1e4], [1e4, 9_995.0, 1e4], [-1e4, 1e4, -1e4], [1e4, -1e4, -1e4]]
    case = logits_case(make_case, student, teacher, divergence=divergence, temperature=temperature, beta=0.2)
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients(memory=memory)
    assert_close(loss_sum, expected.loss_sum, *case.sums)
    assert_close(grad_ND, expected.grad_ND, *case.sums)
    assert_close(grad_VD, expected.grad_VD, *case.sums)


@pytest.mark.numeric
def test_statistics_of_ten_thousand_stay_finite(make_case, naive, assert_close):
    student = [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, -1e4, -1e4]]
    teacher = [[-1e4, 1e4, 0.0], [1e4, 1e4, 1e4], [1e4, -1e4, -1e4]]
    case = logits_case(make_case, student, teacher)
    expected = naive.stats(case)
    stats = case.stats()
    for name in ("entropy_N", "reverse_kl_N", "forward_kl_N", "teacher_entropy_N"):
        assert_close(getattr(stats, name), expected[name], *case.sums)


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_divergence_is_below_zero(divergence, make_case):
    # Nearly equal models: rounding of ±1e-7 must not show as a negative loss in the log.
    case = make_case(200, 301, divergence=divergence)
    case.teacher_NE = case.student_ND.detach() * (1 + 1e-6)
    case.teacher_head_VE = case.student_head_VD.detach()
    for row in range(0, 200, 10):
        case.kept_N = torch.arange(200) == row
        assert float(case.loss().loss_sum.detach()) >= 0.0
    stats = case.stats()
    assert (stats.reverse_kl_N >= 0).all()
    assert (stats.forward_kl_N >= 0).all()


def test_nothing_is_learned_from_a_vocabulary_of_one(make_case):
    # Both models are sure of the only token: 0 nats, gradient 0.
    case = make_case(5, 1)
    loss_sum, grad_ND, grad_VD = case.gradients()
    assert float(loss_sum) == 0.0
    assert not grad_ND.any()
    assert not grad_VD.any()
