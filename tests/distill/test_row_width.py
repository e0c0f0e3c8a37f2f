"""Rows of logits that are wider than the vocabulary, as on CUDA, give the same numbers: here on a CPU.

Forced: the width of a row, and CUDA's way through the products, whose `out_dtype` torch has on CUDA alone.
"""

import pytest
import torch
from tolerance import ROUNDOFF, close, rounding

from opsd.distill import chunks
from opsd.distill.chunks import chunk_rows, row_width
from opsd.distill.inputs import LossSpec, check_inputs
from opsd.distill.matmul import Projection
from opsd.distill.topk import top_tokens

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "eopd")
FIELDS = ("entropy_N", "teacher_entropy_N", "reverse_kl_N", "forward_kl_N", "grad_norm_N")
pytestmark = pytest.mark.usefixtures("wide_rows")
# One entry, the rest alone, an aligned part and a rest of 1 and 63, an aligned part alone.
VOCABS = (1, 37, 65, 127, 128, 301)


@pytest.fixture(params=["cpu", "cuda"])
def products(request):
    """Either way through the products; the left operands of CUDA's."""
    return request.getfixturevalue("cuda_products") if request.param == "cuda" else []


@pytest.fixture
def gradients(monkeypatch):
    """The logit gradients, as the products get them."""
    whole, found = Projection.gradients_, []

    def watched(self, grad_CW, *args):
        found.append(grad_CW)
        return whole(self, grad_CW, *args)

    monkeypatch.setattr(Projection, "gradients_", watched)
    return found


def largest(values):
    return float(values.max())


def masks(tokens):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(tokens, generator=generator) < 0.6, torch.rand(tokens, generator=generator) * 2


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_loss_and_gradients_are_the_definition(products, divergence, vocab, gradients, make_case, naive, assert_close):
    kept_N, weight_N = masks(20)
    case = make_case(
        20, vocab, student_pad=3, teacher_pad=70, vocab_size=vocab, divergence=divergence, beta=0.3, temperature=0.7
    )
    case.kept_N, case.weight_N = kept_N, weight_N
    for chunk_tokens in ("auto", 3):
        expected = naive.loss(case)
        loss_sum, grad_ND, grad_VD = case.gradients(chunk_tokens=chunk_tokens)
        # A vocabulary of one entry leaves nothing to differ on.
        of_one = {"size": 1e-6, "cancels": True} if vocab == 1 else {}
        assert_close(loss_sum, expected.loss_sum, *case.sums, **of_one)
        assert_close(grad_ND, expected.grad_ND, *case.sums, **of_one)
        assert_close(grad_VD, expected.grad_VD, *case.sums, **of_one)
        assert not grad_VD[vocab:].any()
    # Not small, zero: what is beyond the vocabulary has no part in the divergence.
    for gradient_CW in gradients:
        assert gradient_CW.shape[1] == row_width("cpu", vocab) >= vocab
        assert gradient_CW.shape[1] % 64 == 0
        assert not gradient_CW[:, vocab:].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_costs_no_more_than_rounding_to_bf16(products, divergence, make_case, naive, assert_close):
    case = make_case(12, 201, student_pad=3, teacher_pad=5, vocab_size=201, divergence=divergence, dtype=torch.bfloat16)
    case.kept_N, case.weight_N = masks(12)
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients()
    assert_close(loss_sum, expected.loss_sum, *case.sums, size=float(expected.size), cancels=True)
    for found, exact, terms, size in (
        (grad_ND, expected.grad_ND, expected.logit_ND, expected.size_ND),
        (grad_VD, expected.grad_VD, 2 * expected.logit_VD, expected.size_VD),
    ):
        allowed = ROUNDOFF[torch.bfloat16] * (terms + exact.abs()) + rounding(*case.sums) * largest(size)
        assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("products", ["cuda"], indirect=True)
def test_products_read_one_copy_of_the_gradient_in_rows_of_aligned_length(products, make_case):
    case = make_case(5, 201, dtype=torch.bfloat16)
    case.loss().loss_sum.backward()
    # [C, V] by the head's rows, and [V, C] by the hidden states: as many as there are rows of the chunk on one side.
    rows = [left if left.shape[0] == 5 else left.T for left in products if 201 % 64 in left.shape or 192 in left.shape]
    assert len(rows) == 4
    assert {left.untyped_storage().data_ptr() for left in rows} == {rows[0].untyped_storage().data_ptr()}
    assert {left.stride() for left in rows} == {(256, 1)}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_loss_has_rows_of_that_width_too(products, divergence, gradients, make_case, naive, assert_close):
    case = make_case(9, 201, student_pad=3, teacher_pad=5, vocab_size=201, divergence=divergence, temperature=0.7)
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients(memory="whole")
    assert_close(loss_sum, expected.loss_sum, *case.sums)
    assert_close(grad_ND, expected.grad_ND, *case.sums)
    assert_close(grad_VD, expected.grad_VD, *case.sums)
    (gradient_CW,) = gradients
    assert gradient_CW.shape[1] == 256 and not gradient_CW[:, 201:].any()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_statistics_are_their_definitions(products, temperature, make_case, naive, assert_close):
    case = make_case(17, 201, student_pad=3, teacher_pad=5, vocab_size=201, temperature=temperature)
    ids_N = torch.randint(201, (17,), generator=torch.Generator().manual_seed(0))
    needs = frozenset({*FIELDS, "top1_agree_N", "teacher_rank_N"})
    stats = case.stats(needs=needs, token_ids_N=ids_N, chunk_tokens=5)
    expected = naive.stats(case, ids_N)
    for name in FIELDS:
        assert_close(getattr(stats, name), expected[name], *case.sums)
    assert torch.equal(stats.top1_agree_N, expected["top1_agree_N"])
    assert torch.equal(stats.teacher_rank_N, expected["teacher_rank_N"])


@pytest.mark.parametrize("needs", ["entropy_N", "reverse_kl_N"])
def test_logits_that_are_held_give_the_loss_of_their_choice(products, needs, make_case, make_rule, naive, assert_close):
    # The entropy alone holds the student's logits; a divergence both models'.
    case = make_case(20, 201, student_pad=3, teacher_pad=5, vocab_size=201)
    rule = make_rule(lambda stats: getattr(stats, needs) > getattr(stats, needs).median(), needs=frozenset({needs}))
    result = case.loss(selector=rule)
    case.kept_N = result.kept_N
    assert int(case.kept_N.sum()) == 10
    expected = naive.loss(case)
    grad_ND, grad_VD = torch.autograd.grad(result.loss_sum, (case.student_ND, case.student_head_VD))
    assert_close(result.loss_sum.detach(), expected.loss_sum, *case.sums)
    assert_close(grad_ND, expected.grad_ND, *case.sums)
    assert_close(grad_VD, expected.grad_VD, *case.sums)


def test_the_likeliest_tokens_are_of_the_vocabulary(products, make_case, monkeypatch):
    case = make_case(7, 37, student_pad=3)
    with torch.no_grad():
        wide = top_tokens(check_inputs(*case.tensors, token_ids_N=torch.arange(7)), 37, LossSpec())
        monkeypatch.setitem(chunks.ROW_MULTIPLE, "cpu", 1)
        narrow = top_tokens(check_inputs(*case.tensors, token_ids_N=torch.arange(7)), 37, LossSpec())
    for one, other in zip(wide, narrow, strict=True):
        assert torch.equal(one.ids_NK, other.ids_NK)
        close(one.log_prob_NK, other.log_prob_NK, *case.sums)
        close(one.sampled_N, other.sampled_N, *case.sums)


def test_rows_are_as_wide_as_the_vocabulary_on_a_cpu_and_a_multiple_of_64_on_cuda(monkeypatch):
    assert row_width("cuda", 151_669) == 151_680
    assert row_width("cuda", 151_936) == 151_936
    monkeypatch.undo()
    assert row_width("cpu", 151_669) == 151_669


@pytest.mark.parametrize(
    ("bound", "tokens", "rows"),
    [
        (300, 1000, 256),  # 128 fits in 300 twice
        (512, 1000, 512),
        (2048, 1000, 1024),  # as many whole 128 as the tokens need
        (100, 1000, 100),  # below 128 the bound itself
        (100, 7, 7),
        (128, 7, 128),
        (5, 0, 1),
    ],
)
def test_chunks_on_cuda_have_a_multiple_of_128_rows(bound, tokens, rows, monkeypatch):
    monkeypatch.setitem(chunks.CHUNK_MULTIPLE, "cpu", 128)
    assert chunk_rows(bound, tokens, 100, torch.empty(0), torch.float32) == rows
