"""What a caller may rely on: what is kept, what is counted, what is differentiated, what is refused."""

import pytest
import torch
from tolerance import ROUNDOFF, rounding
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.distill import distill_loss
from opsd.distill.matmul import Projection
from opsd.selection import Selection
from opsd.utils.errors import UserError

MEMORIES = ("fused", "whole")


def every_third(tokens):
    return torch.arange(tokens) % 3 == 0


def poisoned(values, kept_N):
    """The same rows, but NaN where dropped: whoever reads them ends in NaN."""
    return torch.where(kept_N[:, None], values.detach(), float("nan"))


@pytest.mark.numeric
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_mask_handed_in_is_used_as_it_is_and_dropped_rows_are_never_read(memory, make_case, naive, assert_close):
    case = make_case(11, 40, kept_N=every_third(11))
    expected = naive.loss(case)
    case.student_ND = poisoned(case.student_ND, case.kept_N).requires_grad_()
    case.teacher_NE = poisoned(case.teacher_NE, case.kept_N)
    result = case.loss(memory=memory)
    assert torch.equal(result.kept_N, case.kept_N)
    grad_ND, grad_VD = torch.autograd.grad(result.loss_sum, (case.student_ND, case.student_head_VD))
    assert_close(result.loss_sum.detach(), expected.loss_sum, *case.sums)
    assert_close(grad_ND, expected.grad_ND, *case.sums)
    assert_close(grad_VD, expected.grad_VD, *case.sums)


def test_a_mask_handed_in_costs_products_on_kept_rows_only(make_case, flops):
    # 4 of 11 rows; V = 40, D = 8, E = 6. Student and teacher logits, then the gradients of hidden and head, each
    # 2 · rows · V · width: 4 · 40 · 2 · (8 + 6 + 8 + 8).
    case = make_case(11, 40, kept_N=every_third(11))
    assert flops(case.gradients) == 4 * 40 * 2 * (8 + 6 + 8 + 8)


def test_all_tokens_without_a_selector_are_projected_once(make_case, flops):
    case = make_case(11, 40)
    assert flops(case.gradients) == 11 * 40 * 2 * (8 + 6 + 8 + 8)


@pytest.mark.numeric
def test_an_entropy_rule_costs_no_teacher_projection_outside_the_kept_rows(
    make_case, make_rule, naive, assert_close, flops
):
    case = make_case(12, 40)
    rule = make_rule(lambda stats: stats.entropy_N >= stats.entropy_N.quantile(0.7), frozenset({"entropy_N"}))
    expected_N = naive.stats(case)["entropy_N"]
    case.kept_N = expected_N >= expected_N.quantile(0.7)
    assert int(case.kept_N.sum()) == 4
    expected = naive.loss(case)
    case.teacher_NE = poisoned(case.teacher_NE, case.kept_N)
    result = case.loss(selector=rule)
    assert torch.equal(result.kept_N, case.kept_N)
    assert_close(result.loss_sum.detach(), expected.loss_sum, *case.sums)
    assert result.stats.reverse_kl_N is None
    # Scoring: 12 student rows. Training: 4 rows of teacher and two gradients, of the student too where the logits that
    # were scored are gone: in chunks of 5.
    work = 12 * 40 * 2 * 8 + 4 * 40 * 2 * (6 + 8 + 8)
    assert flops(lambda: case.gradients(selector=rule)) == work
    assert flops(lambda: case.gradients(selector=rule, chunk_tokens=5)) == work + 4 * 40 * 2 * 8


def test_a_rule_that_reads_the_divergence_costs_one_projection_of_each_model_to_score(make_case, make_rule, flops):
    case = make_case(12, 40)
    rule = make_rule(lambda stats: every_third(12), frozenset({"entropy_N", "reverse_kl_N"}))
    work = 12 * 40 * 2 * (8 + 6) + 4 * 40 * 2 * (8 + 8)
    assert flops(lambda: case.gradients(selector=rule)) == work
    assert flops(lambda: case.gradients(selector=rule, chunk_tokens=5)) == work + 4 * 40 * 2 * (8 + 6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("needs", [{"entropy_N"}, {"entropy_N", "reverse_kl_N"}], ids=["entropy", "divergence"])
@pytest.mark.parametrize("kept", ["third", "last", "all", "none"])
def test_logits_that_were_scored_serve_the_loss(make_case, make_rule, naive, assert_close, divergence, needs, kept):
    # In one chunk the loss reads the logits that the choice has read; in chunks of 5 it projects its rows again.
    masks = {"third": every_third(12), "last": torch.arange(12) >= 9, "all": torch.ones(12, dtype=torch.bool)}
    mask = masks.get(kept, torch.zeros(12, dtype=torch.bool))
    case = make_case(12, 40, divergence=divergence, temperature=1.5, weight_N=torch.linspace(0.5, 2.0, 12))
    rule = make_rule(lambda stats: mask, frozenset(needs))
    held = case.loss(selector=rule)
    again = case.loss(selector=rule, chunk_tokens=5)
    case.kept_N = mask
    expected = naive.loss(case)
    for result in (held, again):
        leaves = (case.student_ND, case.student_head_VD)
        first = torch.autograd.grad(result.loss_sum, leaves, retain_graph=True)
        # A second backward starts from the hidden states: the logits are used up.
        for grads in (first, torch.autograd.grad(result.loss_sum, leaves)):
            assert_close(grads[0], expected.grad_ND, *case.sums)
            assert_close(grads[1], expected.grad_VD, *case.sums)
        assert_close(result.loss_sum.detach(), expected.loss_sum, *case.sums)
        scores = naive.stats(case)
        for name in needs:
            assert_close(getattr(result.stats, name), scores[name], *case.sums)


def test_a_rule_that_reads_lengths_alone_costs_no_scoring(make_case, make_rule, flops):
    case = make_case(12, 40)
    rule = make_rule(lambda stats: every_third(len(stats.rollout_N)))
    assert flops(lambda: case.gradients(selector=rule)) == 4 * 40 * 2 * (8 + 6 + 8 + 8)


@pytest.mark.numeric
def test_a_rule_sees_what_it_needs_and_where_it_comes_from(make_case, make_rule, naive, assert_close):
    case = make_case(10, 30, temperature=1.5)
    rollout_N, token_ids_N = torch.tensor([7] * 4 + [3] * 6), torch.arange(10)
    rule = make_rule(lambda stats: stats.rollout_N == 3, frozenset({"entropy_N", "forward_kl_N", "teacher_rank_N"}))
    result = case.loss(selector=rule, rollout_N=rollout_N, token_ids_N=token_ids_N, seed=41)
    ((stats, seed),) = rule.seen
    assert seed == 41
    assert torch.equal(stats.rollout_N, rollout_N)
    assert torch.equal(stats.token_ids_N, token_ids_N)
    assert stats.vocab_size == 30
    expected = naive.stats(case, token_ids_N)
    assert_close(stats.entropy_N, expected["entropy_N"], *case.sums)
    assert_close(stats.forward_kl_N, expected["forward_kl_N"], *case.sums)
    assert torch.equal(stats.teacher_rank_N, expected["teacher_rank_N"])
    assert stats.reverse_kl_N is None
    assert stats.teacher_entropy_N is None
    assert result.kept_N.tolist() == [False] * 4 + [True] * 6


@pytest.mark.numeric
def test_fields_for_kept_rows_are_scored_there_alone_and_set_the_weights(make_case, make_rule, naive, assert_close):
    case = make_case(12, 40)
    keep = every_third(12)

    def weigher(stats, selection):
        assert stats.teacher_entropy_N[~keep].isnan().all()
        assert not stats.top1_agree_N[~keep].any()
        return Selection(selection.kept_N, 1.0 + stats.teacher_entropy_N)

    rule = make_rule(lambda stats: keep, needs_kept=frozenset({"teacher_entropy_N", "top1_agree_N"}), weigher=weigher)
    scores = naive.stats(case)
    case.kept_N, case.weight_N = keep, 1.0 + scores["teacher_entropy_N"]
    expected = naive.loss(case)
    case.weight_N = None
    case.teacher_NE = poisoned(case.teacher_NE, keep)
    result = case.loss(selector=rule)
    grad_ND, grad_VD = torch.autograd.grad(result.loss_sum, (case.student_ND, case.student_head_VD))
    assert_close(result.loss_sum.detach(), expected.loss_sum, *case.sums)
    assert_close(grad_ND, expected.grad_ND, *case.sums)
    assert_close(grad_VD, expected.grad_VD, *case.sums)
    assert_close(result.stats.teacher_entropy_N[keep], scores["teacher_entropy_N"][keep], *case.sums)
    assert torch.equal(result.stats.top1_agree_N[keep], scores["top1_agree_N"][keep])


@pytest.mark.numeric
def test_weights_of_a_rule_and_of_the_caller_multiply_and_never_change_the_count(
    make_case, make_rule, naive, assert_close
):
    case = make_case(9, 20)
    keep, own, given = every_third(9), torch.arange(9.0), torch.linspace(0.5, 2.0, 9)
    rule = make_rule(lambda stats: keep, weights=lambda stats: own)
    case.kept_N, case.weight_N = keep, own * given
    expected = naive.loss(case)
    result = case.loss(selector=rule, weight_N=given)
    assert_close(result.loss_sum.detach(), expected.loss_sum, *case.sums)
    # Row 0 weighs 0 and is kept all the same.
    assert result.kept_N.tolist() == keep.tolist()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_train_on_backpropagates_zero(memory, tokens, dtype, make_case):
    case = make_case(tokens, 20, dtype=dtype, kept_N=torch.zeros(tokens, dtype=torch.bool))
    result = case.loss(memory=memory)
    assert float(result.loss_sum.detach()) == 0.0
    assert int(result.kept_N.sum()) == 0
    result.loss_sum.backward()
    for leaf in (case.student_ND, case.student_head_VD):
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.dtype == dtype
        assert not leaf.grad.any()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_second_backward_under_retain_graph_gives_the_same_gradients(memory, divergence, make_case):
    case = make_case(7, 50, divergence=divergence, kept_N=torch.arange(7) != 2)
    loss_sum = case.loss(memory=memory).loss_sum
    leaves = (case.student_ND, case.student_head_VD)
    first = [grad.clone() for grad in torch.autograd.grad(loss_sum, leaves, retain_graph=True)]
    second = torch.autograd.grad(loss_sum, leaves)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss_sum, leaves)


@pytest.mark.numeric
def test_the_gradient_that_comes_from_above_scales_ours(make_case, naive, assert_close):
    case = make_case(7, 50)
    expected = naive.loss(case)
    (case.loss().loss_sum / 4 * 3).backward()
    assert_close(case.student_ND.grad, expected.grad_ND * 0.75, *case.sums)
    assert_close(case.student_head_VD.grad, expected.grad_VD * 0.75, *case.sums)


@pytest.mark.numeric
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("frozen", ["student_ND", "student_head_VD"])
def test_only_what_wants_a_gradient_gets_one_and_is_paid_for(memory, frozen, make_case, naive, assert_close, flops):
    case = make_case(7, 50)
    expected = naive.loss(case)
    free = "student_head_VD" if frozen == "student_ND" else "student_ND"
    getattr(case, frozen).requires_grad_(False)
    case.loss(memory=memory).loss_sum.backward()
    assert getattr(case, frozen).grad is None
    grad = {"student_ND": expected.grad_ND, "student_head_VD": expected.grad_VD}[free]
    assert_close(getattr(case, free).grad, grad, *case.sums)
    # Student and teacher logits, and one gradient.
    assert flops(lambda: case.loss(memory=memory).loss_sum.backward()) == 7 * 50 * 2 * (8 + 6 + 8)


@pytest.mark.numeric
@pytest.mark.parametrize("memory", MEMORIES)
def test_without_gradients_only_the_logits_are_paid_for(memory, make_case, naive, assert_close, flops):
    case = make_case(7, 50)
    expected = naive.loss(case)
    with torch.no_grad():
        work = flops(lambda: case.loss(memory=memory))
        result = case.loss(memory=memory)
    assert work == 7 * 50 * 2 * (8 + 6)
    assert not result.loss_sum.requires_grad
    assert_close(result.loss_sum, expected.loss_sum, *case.sums)


@pytest.mark.parametrize("memory", MEMORIES)
def test_inputs_are_left_as_they_were(memory, make_case):
    case = make_case(9, 50, kept_N=every_third(9), weight_N=torch.rand(9))
    tensors = [*case.tensors, case.kept_N, case.weight_N]
    before = [tensor.detach().clone() for tensor in tensors]
    case.gradients(memory=memory)
    case.stats()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.numeric
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_head_that_is_also_the_embedding_gets_both_gradients(memory, make_case, naive, assert_close):
    case = make_case(6, 30)
    token_ids_N = torch.arange(6)
    embedding = case.student_head_VD.detach().double().requires_grad_()
    reference = make_case(6, 30, dtype=torch.float64)
    logp = (embedding[token_ids_N] @ embedding.T).log_softmax(-1)
    logq = (case.teacher_NE.double() @ case.teacher_head_VE.double().T).log_softmax(-1)
    naive.divergence("reverse_kl", logp, logq, reference.beta).sum().backward()
    case.student_ND = case.student_head_VD[token_ids_N]
    case.loss(memory=memory).loss_sum.backward()
    assert_close(case.student_head_VD.grad, embedding.grad, *case.sums)


@pytest.mark.numeric
def test_views_and_transposed_tensors_are_fine(make_case, naive, assert_close):
    case = make_case(8, 30)
    expected = naive.loss(case)
    wide = torch.randn(8, 20)
    wide[:, 5:13] = case.student_ND.detach()
    case.student_ND = wide[:, 5:13].requires_grad_()
    case.student_head_VD = case.student_head_VD.detach().T.contiguous().T.requires_grad_()
    case.teacher_head_VE = case.teacher_head_VE.T.contiguous().T
    loss_sum, grad_ND, grad_VD = case.gradients()
    assert_close(loss_sum, expected.loss_sum, *case.sums)
    assert_close(grad_ND, expected.grad_ND, *case.sums)
    assert_close(grad_VD, expected.grad_VD, *case.sums)


@pytest.mark.numeric
@pytest.mark.parametrize("memory", MEMORIES)
def test_autocast_takes_products_of_bf16_inputs_and_keeps_fp32_logits(memory, make_case, naive, assert_close):
    case = make_case(20, 60)
    rounded = make_case(20, 60)
    with torch.no_grad():
        for tensor in rounded.tensors:
            tensor.copy_(tensor.bfloat16())
    expected = naive.loss(rounded)
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, grad_ND, grad_VD = case.gradients(memory=memory)
    assert grad_ND.dtype == grad_VD.dtype == torch.float32
    assert_close(loss_sum, expected.loss_sum, *case.sums)
    # The gradients' products may round the logit gradient, and the scaled hidden state that it meets, to bf16.
    for found, exact, products in (
        (grad_ND, expected.grad_ND, expected.logit_ND),
        (grad_VD, expected.grad_VD, 2 * expected.logit_VD),
    ):
        slack = rounding(*case.sums) * exact.abs().max()
        assert ((found.double() - exact).abs() <= ROUNDOFF[torch.bfloat16] * products + slack).all()


@pytest.mark.numeric
def test_the_trained_divergence_comes_along_as_a_statistic(make_case, naive, assert_close):
    case = make_case(7, 50)
    scores = naive.stats(case)
    assert_close(case.loss().stats.reverse_kl_N, scores["reverse_kl_N"], *case.sums)
    assert_close(case.loss(divergence="forward_kl").stats.forward_kl_N, scores["forward_kl_N"], *case.sums)
    weighted = case.loss(weight_N=torch.full((7,), 5.0))
    assert_close(weighted.stats.reverse_kl_N, scores["reverse_kl_N"], *case.sums)
    # Not where only some rows were trained on.
    assert case.loss(kept_N=every_third(7)).stats.reverse_kl_N is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "jsd", "beta": 0.0}, r"beta 0.0 for jsd: give a number in \(0, 1\)"),
        ({"divergence": "jsd", "beta": 1.0}, r"beta 1.0 for jsd: give a number in \(0, 1\)"),
        ({"divergence": "kl"}, "unknown divergence 'kl': give one of reverse_kl, forward_kl, jsd"),
        ({"temperature": 0.0}, "temperature 0.0: give a finite number above 0"),
        ({"temperature": float("nan")}, "temperature nan: give a finite number above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens 0: give a number of tokens from 1, or 'auto'"),
        ({"memory": "half"}, "memory 'half': give fused or whole"),
        ({"vocab_size": 21}, "vocab_size 21 but the smaller head has 20 rows: give 1 to 20"),
        ({"vocab_size": 0}, "vocab_size 0 but the smaller head has 20 rows: give 1 to 20"),
        ({"kept_N": torch.ones(3, dtype=torch.bool)}, r"kept_N has shape \(3,\) for 5 tokens"),
        ({"kept_N": torch.ones(5)}, "kept_N has type torch.float32: give one bool per token"),
        ({"weight_N": torch.ones(4)}, r"weight_N has shape \(4,\) for 5 tokens"),
        ({"rollout_N": torch.ones(4)}, r"rollout_N has shape \(4,\) for 5 tokens"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, message, make_case):
    with pytest.raises(UserError, match=message):
        make_case(5, 20, teacher_pad=2).loss(**options)


def test_a_selector_and_a_mask_together_are_refused(make_case, make_rule):
    rule = make_rule(lambda stats: every_third(5))
    with pytest.raises(UserError, match="both a selector and kept_N"):
        make_case(5, 20).loss(selector=rule, kept_N=every_third(5))


def test_hidden_states_that_do_not_fit_are_named(make_case):
    case = make_case(5, 20)
    with pytest.raises(UserError, match=r"teacher hidden states \(5, 8\) and head \(20, 6\) do not fit"):
        distill_loss(case.student_ND, case.student_head_VD, case.student_ND, case.teacher_head_VE)
    with pytest.raises(UserError, match="5 student tokens but 4 teacher tokens"):
        distill_loss(case.student_ND, case.student_head_VD, case.teacher_NE[:4], case.teacher_head_VE)


def test_the_setting_of_cpu_products_is_left_alone_on_cuda():
    head = Projection(torch.ones(2, 2), torch.bfloat16, torch.float32)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with head._precision():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    head.on_cuda = True
    with head._precision():
        assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_whole_losss_backward_does_not_touch_all_rows_once_per_chunk(make_case):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    with Calls():
        make_case(24, 50).gradients(memory="whole", chunk_tokens=4)
    assert called.count("aten._log_softmax_backward_data") == 6  # one for each chunk
    assert "aten.slice_backward" not in called
