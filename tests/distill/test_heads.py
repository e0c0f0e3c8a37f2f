"""Heads with a bias, a scale and a soft cap: loss, gradients and statistics against naive fp64, and no cost without."""

import itertools
from dataclasses import replace

import pytest
import torch
from tolerance import ROUNDOFF, close
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.distill import Head, Transform, distill_loss, token_stats
from opsd.distill.inputs import LossSpec, check_inputs
from opsd.distill.topk import top_tokens
from opsd.utils.errors import UserError

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
SCALED, CAPPED, BOTH = Transform(0.3), Transform(1.0, 4.0), Transform(1.7, 4.0)
# Student's and teacher's: transform and whether there is a bias.
PAIRS = {
    "scaled, plain": ((SCALED, False), (Transform(), False)),
    "plain, scaled": ((Transform(), False), (SCALED, False)),
    "capped, scaled": ((CAPPED, False), (SCALED, True)),
    "biased, capped": ((Transform(), True), (CAPPED, False)),
    "all, all": ((BOTH, True), (Transform(0.6, 7.0), True)),
}
FIELDS = ("entropy_N", "teacher_entropy_N", "reverse_kl_N", "forward_kl_N", "grad_norm_N")


def heads(case, pair, dtype=None):
    """Both heads of a case with biases and transforms; the student's wants gradients."""
    generator, found = torch.Generator().manual_seed(5), []
    for (transform, biased), weight in zip(PAIRS[pair], (case.student_head_VD, case.teacher_head_VE), strict=True):
        weight = weight.detach() if dtype is None else weight.detach().to(dtype)
        bias = torch.randn(weight.shape[0], generator=generator).to(weight.dtype) if biased else None
        found.append(Head(weight, bias, transform))
    student = found[0].changed(lambda part: part.requires_grad_())
    return student, found[1]


def definition(case, student, teacher):
    """Loss, its gradients by hidden states, weight and bias, and each token's logs, by plain autograd in fp64."""
    hidden_ND = case.student_ND.detach().double().requires_grad_()
    ours = student.changed(lambda part: part.detach().double().requires_grad_())
    log_p = (ours.logits(hidden_ND, case.shared) / case.temperature).log_softmax(-1)
    theirs = teacher.changed(lambda part: part.double())
    log_q = (theirs.logits(case.teacher_NE.double(), case.shared) / case.temperature).log_softmax(-1)
    return hidden_ND, ours, log_p, log_q


def leaves_of(hidden_ND, head):
    return [leaf for leaf in (hidden_ND, head.weight_VD, head.bias_V) if leaf is not None]


@pytest.fixture(params=["as on a CPU", "wide rows", "wide rows, CUDA's products"])
def layout(request):
    """Rows of logits and products as they are on either device."""
    if "wide" in request.param:
        request.getfixturevalue("wide_rows")
    if "CUDA" in request.param:
        request.getfixturevalue("cuda_products")


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("pair", PAIRS)
def test_loss_and_gradients_are_the_definition(layout, divergence, pair, make_case, make_rule, naive):
    case = make_case(20, 101, student_pad=3, teacher_pad=5, vocab_size=101, divergence=divergence, temperature=0.7)
    case.beta, case.weight_N = 0.3, torch.rand(20, generator=torch.Generator().manual_seed(1)) + 0.1
    student, teacher = heads(case, pair)
    kept_N = torch.arange(20) % 3 > 0
    hidden_ND, ours, log_p, log_q = definition(case, student, teacher)
    loss_N = naive.divergence(divergence, log_p, log_q, case.beta)
    expected = (loss_N * case.weight_N.double())[kept_N].sum()
    exact = torch.autograd.grad(expected, leaves_of(hidden_ND, ours))
    # Chunk by chunk; all at once; logits that the choice has read already; logits that live through backward.
    rule = make_rule(lambda stats: kept_N, frozenset({"entropy_N", "reverse_kl_N"}))
    ways = ({"kept_N": kept_N, "chunk_tokens": 5}, {"kept_N": kept_N}, {"selector": rule},
            {"kept_N": kept_N, "memory": "whole"})  # fmt: skip
    for way in ways:
        how = {"divergence": divergence, "beta": 0.3, "temperature": 0.7, "vocab_size": 101, "weight_N": case.weight_N}
        loss = distill_loss(case.student_ND, student, case.teacher_NE, teacher, **how, **way).loss_sum
        close(loss, expected, *case.sums)
        found = torch.autograd.grad(loss, leaves_of(case.student_ND, student), retain_graph=True)
        again = torch.autograd.grad(loss, leaves_of(case.student_ND, student))
        for one, other, right in zip(found, again, exact, strict=True):
            close(one, right, *case.sums, said=str(way))
            close(other, right, *case.sums, said=str(way))
            assert one.shape[0] == 20 or not one[101:].any()


@pytest.mark.numeric
@pytest.mark.parametrize("pair", PAIRS)
def test_statistics_and_likeliest_tokens_are_those_of_the_models_own_logits(layout, pair, make_case):
    case = make_case(17, 101, student_pad=3, teacher_pad=5, vocab_size=101, temperature=0.6)
    student, teacher = heads(case, pair)
    ids_N = torch.randint(101, (17,), generator=torch.Generator().manual_seed(0))
    about, how = {"token_ids_N": ids_N, "vocab_size": 101}, {"temperature": 0.6, "chunk_tokens": 5}
    models = (case.student_ND, student, case.teacher_NE, teacher)
    stats = token_stats(*models, needs=frozenset({*FIELDS, "top1_agree_N", "teacher_rank_N"}), **about, **how)
    *_, log_p, log_q = definition(case, student, teacher)
    log_p = log_p.detach()
    p, q = log_p.exp(), log_q.exp()
    reverse = (p * (log_p - log_q)).sum(-1)
    expected = {
        "entropy_N": -(p * log_p).sum(-1),
        "teacher_entropy_N": -(q * log_q).sum(-1),
        "reverse_kl_N": reverse,
        "forward_kl_N": (q * (log_q - log_p)).sum(-1),
        # By the model's logits, not by what a scale or a cap makes them of.
        "grad_norm_N": (p * (log_p - log_q - reverse[:, None])).norm(dim=-1) / 0.6,
    }
    for name, right in expected.items():
        close(getattr(stats, name), right, *case.sums, said=name)
    assert torch.equal(stats.top1_agree_N, log_p.argmax(-1) == log_q.argmax(-1))
    assert torch.equal(stats.teacher_rank_N, (log_q > log_q.gather(-1, ids_N[:, None])).sum(-1))
    for top, logs in zip(top_tokens(check_inputs(*models, **about), 4, LossSpec(**how)), (log_p, log_q), strict=True):
        assert torch.equal(top.ids_NK, logs.topk(4).indices)
        close(top.log_prob_NK, logs.topk(4).values, *case.sums)
        close(top.sampled_N, logs.gather(-1, ids_N[:, None])[:, 0], *case.sums)


@pytest.mark.numeric
def test_bf16_heads_are_read_as_they_are(make_case, naive):
    case = make_case(200, 301, dtype=torch.bfloat16, width=32, teacher_width=32, spread=1.0)
    student, teacher = heads(case, "all, all", torch.bfloat16)
    hidden_ND, ours, log_p, log_q = definition(case, student, teacher)
    expected = naive.divergence("reverse_kl", log_p, log_q, 0.5).sum()
    exact = torch.autograd.grad(expected, leaves_of(hidden_ND, ours))
    loss = distill_loss(case.student_ND, student, case.teacher_NE, teacher).loss_sum
    found = torch.autograd.grad(loss, leaves_of(case.student_ND, student))
    close(loss, expected, *case.sums)
    for one, right in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        # The logit gradient and the result are rounded once each.
        assert float((one.double() - right).norm()) <= 2 * ROUNDOFF[torch.bfloat16] * float(right.norm())


def test_a_frozen_part_of_the_head_gets_no_gradient(make_case):
    for memory, frozen in itertools.product(("fused", "whole"), range(3)):
        case = make_case(6, 30)
        student, teacher = heads(case, "all, all")
        leaves = leaves_of(case.student_ND, student)
        whole = torch.autograd.grad(
            distill_loss(case.student_ND, student, case.teacher_NE, teacher, memory=memory).loss_sum, leaves
        )
        leaves[frozen].requires_grad_(False)
        distill_loss(case.student_ND, student, case.teacher_NE, teacher, memory=memory).loss_sum.backward()
        for number, (leaf, right) in enumerate(zip(leaves, whole, strict=True)):
            assert leaf.grad is None if number == frozen else torch.equal(leaf.grad, right)


class Operations(TorchDispatchMode):
    """What torch is asked to do but for views, in order, with the shapes of what comes out."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not any(view in str(func) for view in ("slice", "alias")):
            self.found.append((str(func), tuple(made.shape) if isinstance(made, torch.Tensor) else None))
        return made


def operations(case, student, teacher, rule):
    with Operations() as seen:
        loss = distill_loss(case.student_ND, student, case.teacher_NE, teacher, selector=rule, chunk_tokens=8).loss_sum
        torch.autograd.grad(loss, leaves_of(case.student_ND, student))
    return seen.found


def of_the_size_of_logits(found, vocab):
    return sum(shape is not None and len(shape) == 2 and shape[1] == vocab for _, shape in found)


def test_a_plain_head_costs_no_operation_more_and_a_scale_one_for_each_block_of_logits(make_case, make_rule):
    case = make_case(16, 101)
    rule = make_rule(lambda stats: torch.ones(16, dtype=torch.bool), frozenset({"entropy_N"}))
    plain, teacher = Head(case.student_head_VD), Head(case.teacher_head_VE)
    found = operations(case, plain, teacher, rule)
    names = [name for name, _ in found]
    assert not any(word in name for name in names for word in ("tanh", "aten.mv"))
    # No operation at a temperature of 1 turns products into logits: one more per block with a scale. The student is
    # read twice in either of two chunks; a scale of the gradient goes into the factor that each row has anyway.
    scaled = operations(case, replace(plain, transform=SCALED), teacher, rule)
    assert of_the_size_of_logits(scaled, 101) - of_the_size_of_logits(found, 101) == 4
    assert len(scaled) - len(found) == 4


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (Head(torch.zeros(20, 8), torch.zeros(19)), r"^student head \(20, 8\) and bias \(19,\) do not fit"),
        (Head(torch.zeros(20, 8), transform=Transform(0.0)), "^student head's scale 0.0 and softcap None: give"),
        (Head(torch.zeros(20, 8), transform=Transform(1.0, -3.0)), "^student head's scale 1.0 and softcap -3.0: give"),
    ],
)
def test_a_head_that_does_not_fit_is_named(head, said, make_case):
    case = make_case(5, 20)
    with pytest.raises(UserError, match=said):
        distill_loss(case.student_ND, head, case.teacher_NE, case.teacher_head_VE)
