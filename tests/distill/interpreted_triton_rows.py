"""The row kernels in Triton's interpreter, on a CPU, against fp64.

`test_triton_rows.py` runs this in a process that has TRITON_INTERPRET=1 from its start. The interpreter computes as
numpy does: its exponentials are not a GPU's, and its bf16 is not rounded to nearest.
"""

import os
import runpy
from pathlib import Path

import pytest
import torch

from opsd.distill import triton_rows, workspace
from opsd.distill.inputs import LossSpec
from opsd.distill.logits import Logits
from opsd.distill.workspace import Workspace
from opsd.types import Transform

assert os.environ.get("TRITON_INTERPRET") == "1"

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "eopd")
NATS = ("entropy_N", "teacher_entropy_N", "reverse_kl_N", "forward_kl_N")
SAMPLED = {"teacher_rank_N", "log_ratio_N"}
FIELDS = frozenset({*NATS, *SAMPLED, "grad_norm_N", "top1_agree_N", "teacher_mass_N"})
BETA = 0.3
# Nats, between the teachers' entropies of these tests.
THRESHOLD = 1.5
INF = float("inf")
PLAIN = (Transform(), Transform())
# The same claims as for torch's operations.
HEADS = runpy.run_path(str(Path(__file__).with_name("test_heads.py")))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So small that a row of a test has several."""
    monkeypatch.setattr(triton_rows, "STATISTICS_BLOCK", 64)
    monkeypatch.setattr(triton_rows, "GRADIENT_BLOCK", 128)


def logits(rows, vocab, spread=3.0, apart=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student_CV, teacher_CV = (torch.randn(rows, vocab, generator=generator) * spread for _ in range(2))
    return student_CV, teacher_CV + apart


def weights(rows):
    return torch.rand(rows, generator=torch.Generator().manual_seed(7)) + 0.1


def plogp(p, log_p):
    return torch.where(p > 0, p * torch.where(p > 0, log_p, 0.0), 0.0)


def rows_of(student_CV, teacher_CV, kept=(None, None), transforms=PLAIN, vocab=None):
    """Products as the kernels take them. kept: rows that are picked of the student's and the teacher's."""
    teacher_work = teacher_CV if kept[0] is None or kept[1] is not None else torch.empty(0)
    vocab = student_CV.shape[1] if vocab is None else vocab
    work = Workspace(student_CV, teacher_work, torch.empty(0), transforms, vocab, kernels=True)
    return Logits(work, student_CV, teacher_CV, held=True, kept_C=kept[0])


def token_fields(needs, student_CV, teacher_CV, temperature, ids_C, **how):
    return triton_rows.token_fields(needs, rows_of(student_CV, teacher_CV, **how), temperature, ids_C)


def gradient_(divergence, temperature, student_CV, teacher_CV, scale_C, out_CV, **how):
    spec = LossSpec(divergence, BETA, temperature, entropy_threshold=THRESHOLD)
    return triton_rows.gradient_(rows_of(student_CV, teacher_CV, **how), spec, scale_C, out_CV)


def exact(student_CV, teacher_CV, temperature, ids_C=None):
    """Divergences, fields and logit gradients in fp64."""
    student, teacher = student_CV.double(), teacher_CV.double()
    logp, logq = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    ratio = torch.where(p > 0, logp - logq, 0.0)
    reverse = (p * ratio).sum(-1, keepdim=True)
    logm = torch.logaddexp(logq + torch.tensor(BETA).double().log(), logp + torch.tensor(1 - BETA).double().log())
    against = torch.where(p > 0, logp - logm, 0.0)
    student_nats = (p * against).sum(-1, keepdim=True)
    forward = (plogp(q, logq) - torch.where(q > 0, q * logp, 0.0)).sum(-1)
    teacher_nats = (plogp(q, logq) - torch.where(q > 0, q * torch.where(q > 0, logm, 0.0), 0.0)).sum(-1)
    unsure = (-plogp(q, logq).sum(-1) > THRESHOLD).double()
    losses = {
        "eopd": reverse[:, 0] + unsure * forward,
        "reverse_kl": reverse[:, 0],
        "forward_kl": forward,
        "jsd": BETA * teacher_nats + (1 - BETA) * student_nats[:, 0],
    }
    gradients = {
        "eopd": (p * (ratio - reverse) + unsure[:, None] * (p - q)) / temperature,
        "reverse_kl": p * (ratio - reverse) / temperature,
        "forward_kl": (p - q) / temperature,
        "jsd": (1 - BETA) * p * (against - student_nats) / temperature,
    }
    best = student.argmax(-1, keepdim=True)
    fields = {
        "entropy_N": -plogp(p, logp).sum(-1),
        "teacher_entropy_N": -plogp(q, logq).sum(-1),
        "reverse_kl_N": losses["reverse_kl"],
        "forward_kl_N": losses["forward_kl"],
        "grad_norm_N": gradients["reverse_kl"].norm(dim=-1),
        "top1_agree_N": teacher.gather(-1, best)[:, 0] == teacher.amax(-1),
        "teacher_mass_N": q.gather(-1, student.topk(min(16, student.shape[-1])).indices).sum(-1),
    }
    if ids_C is not None:
        fields["teacher_rank_N"] = (teacher > teacher.gather(-1, ids_C[:, None])).sum(-1)
        fields["log_ratio_N"] = (logq - logp).gather(-1, ids_C[:, None])[:, 0]
    return losses, gradients, fields


def loss_and_gradient(divergence, student_CV, teacher_CV, temperature=1.0, weight_C=None, dtype=torch.float32):
    """Of the kernels, into a buffer of its own."""
    out_CV = torch.full(student_CV.shape, 7.0, dtype=dtype)
    scale_C = (torch.ones(len(student_CV)) if weight_C is None else weight_C) / temperature
    loss_C = gradient_(divergence, temperature, student_CV, teacher_CV, scale_C, out_CV)
    return loss_C, out_CV


# 1, odd, less than a block, a whole number of blocks, and one more.
@pytest.mark.parametrize("vocab", [1, 37, 256, 257])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_everything_is_its_definition(vocab, temperature, assert_close):
    # The teacher's logits lie 20 above the student's: no divergence notices, to the last digits.
    student_CV, teacher_CV = logits(4, vocab, apart=20.0)
    ids_C, weight_C = torch.tensor([0, vocab - 1, vocab // 2, vocab // 3]), weights(4)
    losses, gradients, fields = exact(student_CV, teacher_CV, temperature, ids_C)
    found = token_fields(FIELDS, student_CV, teacher_CV, temperature, ids_C)
    assert found.keys() == FIELDS
    # A vocabulary of one entry has nothing but zeros.
    of_one = {"size": 1e-2, "cancels": True} if vocab == 1 else {}
    for name in (*NATS, "grad_norm_N"):
        assert_close(found[name], fields[name], vocab, 20, said=name, **of_one)
    for name in ("teacher_mass_N", "log_ratio_N"):
        assert_close(found[name], fields[name], vocab, 20, size=20.0, cancels=True, said=name)
    assert torch.equal(found["top1_agree_N"], fields["top1_agree_N"])
    assert torch.equal(found["teacher_rank_N"], fields["teacher_rank_N"])
    for divergence in DIVERGENCES:
        loss_C, out_CV = loss_and_gradient(divergence, student_CV, teacher_CV, temperature, weight_C)
        expected_CV = gradients[divergence] * weight_C.double()[:, None]
        assert_close(loss_C, losses[divergence], vocab, 20, said=divergence, **of_one)
        assert_close(out_CV, expected_CV, vocab, 20, said=divergence, **of_one)


def test_without_a_teacher_the_students_entropy_is_there_alone(assert_close):
    student_CV, teacher_CV = logits(3, 100)
    found = token_fields(frozenset({"entropy_N"}), student_CV, None, 0.7, None)
    assert found.keys() == {"entropy_N"}
    assert_close(found["entropy_N"], exact(student_CV, teacher_CV, 0.7)[2]["entropy_N"], 100)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_gradient_in_bf16_is_the_fp32_one_rounded(divergence):
    student_CV, teacher_CV = logits(3, 201)
    _, wide_CV = loss_and_gradient(divergence, student_CV, teacher_CV)
    _, narrow_CV = loss_and_gradient(divergence, student_CV, teacher_CV, dtype=torch.bfloat16)
    # The interpreter may cut where a GPU rounds: a whole step of bf16, 2^-7 of the value.
    assert ((narrow_CV.double() - wide_CV.double()).abs() <= 2.0**-7 * wide_CV.double().abs() + 1e-38).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_gradient_over_the_students_logits_and_of_picked_rows_is_the_same(divergence):
    student_CV, teacher_CV = logits(5, 201)
    loss_C, out_CV = loss_and_gradient(divergence, student_CV, teacher_CV)
    places_K, picked_KV = torch.tensor([1, 4]), torch.empty(2, 201)
    ones_K = torch.ones(2)
    for teacher, rows_K in ((teacher_CV, places_K), (teacher_CV[places_K], None)):
        loss_K = gradient_(divergence, 1.0, student_CV, teacher, ones_K, picked_KV, kept=(places_K, rows_K))
        assert torch.equal(loss_K, loss_C[places_K]) and torch.equal(picked_KV, out_CV[places_K])
    gradient_(divergence, 1.0, student_CV, teacher_CV, torch.ones(5), student_CV)
    assert torch.equal(student_CV, out_CV)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_is_beyond_the_vocabulary_changes_nothing_and_has_no_gradient(divergence, temperature, assert_close):
    student_CV, teacher_CV = logits(3, 201)
    losses, gradients, fields = exact(student_CV, teacher_CV, temperature)
    tail_CV = torch.full((3, 55), -1e30)
    student_CW, teacher_CW = torch.cat([student_CV, tail_CV], 1), torch.cat([teacher_CV, tail_CV], 1)
    loss_C, out_CW = loss_and_gradient(divergence, student_CW, teacher_CW, temperature)
    assert_close(loss_C, losses[divergence], 201)
    assert_close(out_CW[:, :201], gradients[divergence], 201)
    assert not out_CW[:, 201:].any()
    found = token_fields(FIELDS - SAMPLED, student_CW, teacher_CW, temperature, None)
    for name in (*NATS, "grad_norm_N"):
        assert_close(found[name], fields[name], 201, said=name)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_logit_of_minus_infinity_is_a_probability_of_zero(divergence, assert_close):
    student_CV, teacher_CV = logits(3, 201)
    # Of both models for whole blocks, the first one's too; of the student alone elsewhere.
    student_CV[:, :70] = teacher_CV[:, :70] = -INF
    if divergence not in ("forward_kl", "eopd"):
        student_CV[:, 150:160] = -INF
    losses, gradients, _ = exact(student_CV, teacher_CV, 1.0)
    loss_C, out_CV = loss_and_gradient(divergence, student_CV, teacher_CV)
    assert_close(loss_C, losses[divergence], 201, 20)
    assert_close(out_CV, gradients[divergence], 201, 20)


def test_a_token_that_the_student_cannot_take_costs_the_forward_kl_everything():
    student_CV, teacher_CV = logits(2, 100)
    student_CV[0, 3] = -INF
    loss_C, out_CV = loss_and_gradient("forward_kl", student_CV, teacher_CV)
    assert loss_C[0] == INF and loss_C[1].isfinite() and out_CV.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand_are_finite(divergence, assert_close):
    student_CV, teacher_CV = logits(4, 201, spread=1e4)
    losses, gradients, _ = exact(student_CV, teacher_CV, 1.0)
    loss_C, out_CV = loss_and_gradient(divergence, student_CV, teacher_CV)
    assert_close(loss_C, losses[divergence], 201)
    # Where all lies on one token, what is left of terms p·u of this size is their rounding.
    assert_close(out_CV, gradients[divergence], 201, size=float(losses["reverse_kl"].max()), cancels=True)


def test_a_sure_tokens_entropy_is_off_by_a_few_roundings_of_one():
    student_CV, teacher_CV = logits(3, 201, spread=1.0)
    student_CV[:, 5] += 20.0
    found = token_fields(frozenset({"entropy_N"}), student_CV, teacher_CV, 1.0, None)["entropy_N"]
    expected = exact(student_CV, teacher_CV, 1.0)[2]["entropy_N"]
    assert expected.max() < 1e-4
    # ln Σ exp of a sum just above 1.
    assert ((found.double() - expected).abs() <= 2.0**-22).all() and (found > 0).all()


def test_of_equal_logits_the_first_is_the_mode():
    student_CV, teacher_CV = torch.zeros(2, 300), torch.zeros(2, 300)
    student_CV[:, [200, 17]] = 5.0
    teacher_CV[0, 17] = teacher_CV[1, 200] = 5.0
    found = token_fields(frozenset({"top1_agree_N"}), student_CV, teacher_CV, 1.0, None)
    assert found["top1_agree_N"].tolist() == [True, False]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_nan(divergence):
    student_CV, teacher_CV = logits(3, 201)
    student_CV[0, 150] = teacher_CV[1, 3] = float("nan")
    loss_C, out_CV = loss_and_gradient(divergence, student_CV, teacher_CV)
    assert loss_C[:2].isnan().all() and out_CV[:2].isnan().any(-1).all()
    assert loss_C[2].isfinite() and out_CV[2].isfinite().all()
    found = token_fields(FIELDS - SAMPLED, student_CV, teacher_CV, 1.0, None)
    assert found["reverse_kl_N"][:2].isnan().all() and found["grad_norm_N"][:2].isnan().all()
    assert found["entropy_N"][0].isnan() and found["teacher_entropy_N"][1].isnan()
    assert not found["top1_agree_N"][:2].any()


def test_a_vocabulary_of_152_thousand_costs_no_digits(monkeypatch, assert_close):
    monkeypatch.undo()
    student_CV, teacher_CV = logits(1, 151_936, spread=0.5, apart=20.0)
    losses, gradients, fields = exact(student_CV, teacher_CV, 1.0)
    for divergence in DIVERGENCES:
        loss_C, out_CV = loss_and_gradient(divergence, student_CV, teacher_CV)
        assert_close(loss_C, losses[divergence], 151_936, said=divergence)
        assert_close(out_CV, gradients[divergence], 151_936, said=divergence)
    found = token_fields(FIELDS - SAMPLED, student_CV, teacher_CV, 1.0, None)
    for name in (*NATS, "grad_norm_N"):
        assert_close(found[name], fields[name], 151_936, said=name)


SCALED, CAPPED, BOTH = Transform(0.3), Transform(1.0, 4.0), Transform(1.7, 4.0)


@pytest.mark.parametrize("transforms", [(SCALED, PLAIN[0]), (CAPPED, SCALED), (PLAIN[0], CAPPED), (BOTH, BOTH)])
@pytest.mark.parametrize("vocab", [1, 37, 256, 257])
def test_scales_and_caps_are_taken_as_logits_are_read(transforms, vocab, assert_close):
    temperature, weight_C = 0.6, weights(4)
    # Rows are wider than the vocabulary; products of up to 6 and down to 1e-4, as caps bend them and leave them.
    products = [of * torch.logspace(-4, 0.5, vocab) for of in logits(4, vocab, spread=0.7)]
    wide = [torch.cat([of, torch.full((4, 63), -1e30)], 1) for of in products]
    ids_C = torch.tensor([0, vocab - 1, vocab // 2, vocab // 3])
    leaf = products[0].double().requires_grad_()
    own = transforms[0](leaf)
    losses, gradients, fields = exact(own.detach(), transforms[1](products[1].double()), temperature, ids_C)
    how = {"transforms": transforms, "vocab": vocab}
    found = token_fields(FIELDS, *wide, temperature, ids_C, **how)
    of_one = {"size": 1e-2, "cancels": True} if vocab == 1 else {}
    for name in (*NATS, "grad_norm_N"):
        assert_close(found[name], fields[name], vocab, 20, said=name, **of_one)
    for name in ("teacher_mass_N", "log_ratio_N"):
        assert_close(found[name], fields[name], vocab, 20, size=20.0, cancels=True, said=name)
    assert torch.equal(found["top1_agree_N"], fields["top1_agree_N"])
    assert torch.equal(found["teacher_rank_N"], fields["teacher_rank_N"])
    for divergence in DIVERGENCES:
        out_CW = torch.full_like(wide[0], 7.0)
        scale_C = weight_C * (transforms[0].scale / temperature)
        loss_C = gradient_(divergence, temperature, *wide, scale_C, out_CW, **how)
        assert_close(loss_C, losses[divergence], vocab, 20, said=divergence, **of_one)
        (expected_CV,) = torch.autograd.grad(own, leaf, gradients[divergence] * weight_C[:, None], retain_graph=True)
        assert_close(out_CW[:, :vocab], expected_CV, vocab, 20, said=divergence, **of_one)
        assert not out_CW[:, vocab:].any()


def test_a_cap_keeps_the_digits_of_small_products(assert_close):
    # 1 - exp(-2x) of an x of 1e-4 has none of its last four.
    student_CV, teacher_CV = (1e-3 * of for of in logits(3, 100))
    found = token_fields(frozenset({"grad_norm_N"}), student_CV, teacher_CV, 1.0, None, transforms=(CAPPED, CAPPED))
    expected = exact(CAPPED(student_CV.double()), CAPPED(teacher_CV.double()), 1.0)[2]
    assert_close(found["grad_norm_N"], expected["grad_norm_N"], 100, size=1e-2, cancels=True)


@pytest.fixture
def as_on_cuda(monkeypatch, wide_rows, cuda_products):
    """The loss core as it runs on CUDA: wide rows, its products, the row kernels."""
    monkeypatch.setattr(workspace, "has_row_kernels", lambda like, wide: wide == torch.float32)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_by_kernels_is_the_definition(divergence, as_on_cuda, make_case, naive, assert_close):
    case = make_case(
        7, 101, student_pad=3, teacher_pad=5, vocab_size=101, divergence=divergence, temperature=0.7, spread=1.0
    )
    case.kept_N = torch.tensor([True, True, False, True, True, False, True])
    case.weight_N = weights(7)
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients(chunk_tokens=2)
    assert_close(loss_sum, expected.loss_sum, *case.sums)
    assert_close(grad_ND, expected.grad_ND, *case.sums)
    assert_close(grad_VD, expected.grad_VD, *case.sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [{"entropy_N"}, {"reverse_kl_N", "entropy_N"}, set()])
def test_a_choice_by_kernels_trains_on_its_rows(dtype, needs, as_on_cuda, make_case, make_rule, naive, assert_close):
    # Logits that are held: the student's alone, both models', none; in two types of products.
    # A beta of 0 is allowed where nothing reads it.
    case = make_case(6, 101, student_pad=3, teacher_pad=5, vocab_size=101, dtype=dtype, beta=0.0)
    kept_N, seen = torch.tensor([False, True, True, False, True, True]), []
    rule = make_rule(lambda stats: seen.append(stats) or kept_N, needs=frozenset(needs))
    loss_sum = case.loss(selector=rule).loss_sum
    grads = torch.autograd.grad(loss_sum, (case.student_ND, case.student_head_VD))
    scores = naive.stats(case)
    for name in needs:
        assert_close(getattr(seen[0], name), scores[name], *case.sums, said=name)
    case.kept_N = kept_N
    expected = naive.loss(case)
    assert_close(loss_sum.detach(), expected.loss_sum, *case.sums)
    for found, right in zip(grads, (expected.grad_ND, expected.grad_VD), strict=True):
        if dtype == torch.float32:
            assert_close(found, right, *case.sums)
        else:  # the interpreter cuts logit gradients to bf16
            assert (found.double() - right).norm() <= 2.0**-7 * right.norm()


@pytest.mark.parametrize(
    ("divergence", "pair"), [("reverse_kl", "all, all"), ("forward_kl", "biased, capped"), ("jsd", "capped, scaled")]
)
def test_the_loss_of_heads_of_every_kind_by_kernels(divergence, pair, as_on_cuda, make_case, make_rule, naive):
    HEADS["test_loss_and_gradients_are_the_definition"](None, divergence, pair, make_case, make_rule, naive)


def test_the_statistics_of_a_head_of_every_kind_by_kernels(as_on_cuda, make_case):
    HEADS["test_statistics_and_likeliest_tokens_are_those_of_the_models_own_logits"](None, "all, all", make_case)
