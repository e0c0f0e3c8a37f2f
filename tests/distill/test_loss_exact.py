"""The loss and its gradients against their definitions in fp64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerance import MOST, ROUNDOFF, rounding

from opsd.distill import distill_loss

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "eopd")
# Of large cases the quick tests take one.
ONE_FAST = [DIVERGENCES[0], *(pytest.param(name, marks=pytest.mark.e2e) for name in DIVERGENCES[1:])]


@st.composite
def options(draw, tokens):
    """How a loss over `tokens` rows may be taken: everything but the numbers themselves."""
    keep = draw(st.sampled_from(["all", "some", "none"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kept_N = None
    if keep != "all":
        kept_N = torch.rand(tokens, generator=generator) < (0.4 if keep == "some" else 0.0)
    weight_N = None
    if draw(st.booleans()):
        # A fifth of the weights is zero: such a token counts, but adds nothing.
        weight_N = torch.rand(tokens, generator=generator) * 3 * (torch.rand(tokens, generator=generator) > 0.2)
    return {
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "beta": draw(st.sampled_from([0.5, 0.1, 0.9])),
        "temperature": draw(st.sampled_from([1.0, 0.6, 2.0])),
        "kept_N": kept_N,
        "weight_N": weight_N,
        "more": {
            "chunk_tokens": draw(st.sampled_from(["auto", 1, 2, 3, 5, 64, 10_000])),
            "memory": draw(st.sampled_from(["fused", "fused", "whole"])),
        },
    }


@st.composite
def shapes(draw):
    """Heads of equal or different height, cut to the lower one or to an explicit vocabulary."""
    vocab = draw(st.sampled_from([1, 2, 3, 17, 64, 101, 257]))
    student_pad, teacher_pad = draw(st.sampled_from([(0, 0), (3, 0), (0, 5)]))
    explicit = draw(st.booleans())
    if explicit:
        student_pad, teacher_pad = student_pad + 2, teacher_pad + 1
    return {
        "vocab": vocab,
        "student_pad": student_pad,
        "teacher_pad": teacher_pad,
        "vocab_size": vocab if explicit else None,
        "width": draw(st.sampled_from([1, 8, 13])),
        "teacher_width": draw(st.sampled_from([1, 6, 16])),
        "seed": draw(st.integers(0, 2**20)),
    }


@st.composite
def cases(draw):
    tokens = draw(st.sampled_from([0, 1, 7, 40]))
    return {"tokens": tokens, **draw(shapes()), **draw(options(tokens))}


# Of all that were drawn, the one whose student gradient was rounded worst.
ROUNDED_THRICE = {
    "tokens": 40,
    "vocab": 2,
    "width": 8,
    "teacher_width": 1,
    "seed": 29998,
    "temperature": 2.0,
    "more": {"chunk_tokens": "auto"},
}


def largest(values):
    return float(values.max()) if values.numel() else 0.0


@pytest.mark.numeric
@settings(max_examples=150, deadline=None)
@given(arguments=cases())
def test_fp32_loss_and_gradients_are_the_definition(arguments, make_case, naive, assert_close):
    case = make_case(**arguments)
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients()
    assert loss_sum.dtype == torch.float32
    # A sum that vanishes (a vocabulary of one, nothing kept) is compared with the magnitudes of its terms.
    assert_close(loss_sum, expected.loss_sum, *case.sums, size=float(expected.size), cancels=True)
    # Likewise a gradient whose terms cancel: with the sum of their magnitudes.
    assert_close(grad_ND, expected.grad_ND, *case.sums, size=largest(expected.size_ND), cancels=True)
    assert_close(grad_VD, expected.grad_VD, *case.sums, size=largest(expected.size_VD), cancels=True)
    # Dropped rows and padded rows of the vocabulary: not small, zero.
    assert not grad_ND[~expected.kept_N].any()
    assert not grad_VD[case.shared :].any()


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", ONE_FAST)
@pytest.mark.parametrize("chunk_tokens", [300, "auto"])
def test_a_thousand_tokens_and_an_odd_vocabulary_agree_too(divergence, chunk_tokens, make_case, naive, assert_close):
    # 1000 rows in chunks of at most 300 are four of 250; 4099 is prime.
    case = make_case(1000, 4099, student_pad=6, divergence=divergence, beta=0.3, temperature=0.8)
    case.kept_N = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.5
    case.weight_N = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients(chunk_tokens=chunk_tokens)
    assert_close(loss_sum, expected.loss_sum, *case.sums)
    assert_close(grad_ND, expected.grad_ND, *case.sums)
    assert_close(grad_VD, expected.grad_VD, *case.sums)


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", ONE_FAST)
def test_a_vocabulary_of_152_thousand_and_shifted_logits_cost_no_digits(divergence, make_case, naive, assert_close):
    # The teacher's logits lie 20 above the student's: no divergence notices. Were they not centred first, sums of 20
    # would be rounded where 0.1 nats are meant; and torch's softmax over 151,936 tokens sums to 1 ± 1e-6 to 1e-5.
    case = make_case(4, 151_936, spread=0.3, divergence=divergence, beta=0.3)
    with torch.no_grad():
        case.teacher_NE[:, 0], case.teacher_head_VE[:, 0] = 20.0, 1.0
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients()
    assert_close(loss_sum, expected.loss_sum, *case.sums)
    assert_close(grad_ND, expected.grad_ND, *case.sums)
    assert_close(grad_VD, expected.grad_VD, *case.sums)
    stats, scores = case.stats(), naive.stats(case)
    for name in ("entropy_N", "reverse_kl_N", "forward_kl_N", "teacher_entropy_N"):
        assert_close(getattr(stats, name), scores[name], *case.sums)


@pytest.mark.numeric
@settings(max_examples=60, deadline=None)
@example(arguments=ROUNDED_THRICE, types=("bf16", "fp32"))
@given(arguments=cases(), types=st.sampled_from([("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16")]))
def test_bf16_costs_no_more_than_rounding_to_bf16(arguments, types, make_case, naive, assert_close):
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    case = make_case(**arguments, dtype=names[types[0]], teacher_dtype=names[types[1]])
    # The reference starts from the same rounded inputs, so the logits differ by fp32 rounding alone, and so does the
    # loss. The gradients are sums of products whose logit gradient, and the scaled hidden state that it meets, may be
    # rounded to bf16, and end in the input type; the sum over the vocabulary is rounded before it is scaled, too. Each
    # rounding is off by at most 2^-8 of its value.
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients()
    assert loss_sum.dtype == torch.float32
    assert grad_ND.dtype == grad_VD.dtype == names[types[0]]
    assert_close(loss_sum, expected.loss_sum, *case.sums, size=float(expected.size), cancels=True)
    for found, exact, products, size in (
        (grad_ND, expected.grad_ND, expected.logit_ND + expected.grad_ND.abs(), expected.size_ND),
        (grad_VD, expected.grad_VD, 2 * expected.logit_VD, expected.size_VD),
    ):
        allowed = ROUNDOFF[torch.bfloat16] * (products + exact.abs()) + rounding(*case.sums) * largest(size)
        assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", ONE_FAST)
def test_bf16_rounds_gradients_without_a_bias(divergence, make_case, naive):
    # One number is off by up to 2^-8, but by as much up as down: of 100 000 and more, projected on what they should
    # be, random errors leave some 1e-5. A factor of 1 + 1e-4 would be seen, though no single number shows it. Flat
    # distributions, so that no few numbers decide.
    wide = {"width": 64, "teacher_width": 64, "spread": 0.3, "dtype": torch.bfloat16}
    case = make_case(1000, 2053, divergence=divergence, **wide)
    expected = naive.loss(case)
    _, _, grad_VD = case.gradients()
    share = float((grad_VD.double() * expected.grad_VD).sum() / expected.grad_VD.square().sum())
    assert abs(share - 1) <= MOST


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp64_inputs_are_worked_on_in_fp64(divergence, make_case, naive, assert_close):
    case = make_case(7, 101, dtype=torch.float64, divergence=divergence, temperature=1.3)
    expected = naive.loss(case)
    loss_sum, grad_ND, grad_VD = case.gradients()
    double = torch.float64
    assert_close(loss_sum, expected.loss_sum, *case.sums, dtype=double, size=float(expected.size))
    assert_close(grad_ND, expected.grad_ND, *case.sums, dtype=double, size=largest(expected.size_ND))
    assert_close(grad_VD, expected.grad_VD, *case.sums, dtype=double, size=largest(expected.size_VD))


@pytest.mark.numeric
def test_bf16_logits_are_not_rounded_to_bf16(make_case, naive, assert_close):
    # Logits near 60 with a bf16 spacing of 0.25: were they rounded, a divergence of about 0.1 nats would be noise.
    case = make_case(1024, 50, dtype=torch.bfloat16, width=16, teacher_width=16)
    with torch.no_grad():
        case.student_ND[:, 0], case.student_head_VD[:, 0] = 8.0, 7.5
        case.teacher_NE.copy_(case.student_ND)
        case.teacher_head_VE.copy_(case.student_head_VD)
        case.teacher_head_VE.add_(0.02 * torch.randn(50, 16, generator=torch.Generator().manual_seed(3)))
    expected = naive.loss(case)
    assert 0.001 < float(expected.loss_sum) / 1024 < 0.5
    # Each of the 51,200 logits of 60 is off by itself and moves the loss by its gradient: a walk, not a sum.
    size = 60.0 * float(naive.stats(case)["grad_norm_N"].norm())
    assert_close(case.loss().loss_sum, expected.loss_sum, *case.sums, size=size)


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_sizes_change_nothing_but_rounding(divergence, dtype, make_case, assert_close):
    case = make_case(90, 1003, divergence=divergence, dtype=dtype)
    whole = case.gradients(chunk_tokens=90)
    for chunk_tokens in (1, 7, 32, 89, "auto"):
        cut = case.gradients(chunk_tokens=chunk_tokens)
        for found, expected in zip(cut, whole, strict=True):
            if found.dtype == torch.float32:
                assert_close(found, expected, *case.sums)
            else:
                # bf16 gradients round once more at the end: neighbours of a tie may lie a spacing apart.
                assert ((found - expected).abs() <= 2 * ROUNDOFF[torch.bfloat16] * expected.abs().max()).all()


@pytest.mark.numeric
def test_the_heads_gradient_is_accumulated_in_fp32(make_case, naive):
    # 512 equal tokens in 512 chunks. A running sum in bf16 stops growing once it is 256 times its increment.
    case = make_case(1, 11, dtype=torch.bfloat16)
    one = naive.loss(case).grad_VD
    case.student_ND = case.student_ND.detach().repeat(512, 1).requires_grad_()
    case.teacher_NE = case.teacher_NE.repeat(512, 1)
    _, _, grad_VD = case.gradients(chunk_tokens=1)
    # The logit gradient may round to bf16 before the product: 2^-8, and the result once more.
    allowed = 512 * (2 * ROUNDOFF[torch.bfloat16] * one.abs() + rounding(*case.sums) * largest(one.abs()))
    assert ((grad_VD.double() - 512 * one).abs() <= allowed).all()


@pytest.mark.numeric
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_divides_the_gradient_once(divergence, make_case, assert_close):
    # The loss at T over hidden h is the loss at 1 over h/T; by the chain rule its gradient carries 1/T, and no T².
    hot = make_case(9, 33, divergence=divergence, temperature=2.0)
    cool = make_case(9, 33, divergence=divergence)
    with torch.no_grad():
        cool.student_ND.div_(2.0)
        cool.teacher_NE.div_(2.0)
    loss, grad_ND, grad_VD = hot.gradients()
    cool_loss, cool_grad_ND, cool_grad_VD = cool.gradients()
    assert_close(loss, cool_loss, *hot.sums)
    assert_close(grad_ND, cool_grad_ND / 2.0, *hot.sums)
    assert_close(grad_VD, cool_grad_VD, *hot.sums)


@pytest.mark.numeric
def test_a_two_token_vocabulary_by_hand(assert_close):
    # Student logits (0, 0): p = (1/2, 1/2). Teacher logits (ln 3, 0): q = (3/4, 1/4).
    # Reverse KL: ½·ln(½/¾) + ½·ln(½/¼) = ½·ln(2/3) + ½·ln 2 = ½·ln(4/3).
    # Logit gradient p·(r − kl), r = (ln 2/3, ln 2): ½·(ln 2/3 − ½ ln 4/3) = −¼·ln 3 and +¼·ln 3.
    hidden = torch.ones(1, 1, requires_grad=True)
    head = torch.zeros(2, 1, requires_grad=True)
    teacher_head = torch.tensor([[3.0], [1.0]]).log()
    loss = distill_loss(hidden, head, torch.ones(1, 1), teacher_head).loss_sum
    (grad_head,) = torch.autograd.grad(loss, head)
    ln3, ln43 = 1.0986122886681098, 0.28768207245178085
    sums = (1, 1, 2, 1)  # widths, vocabulary, tokens
    assert_close(loss, 0.5 * ln43, *sums)
    assert_close(grad_head[:, 0], [-0.25 * ln3, 0.25 * ln3], *sums)
    forward = distill_loss(hidden, head, torch.ones(1, 1), teacher_head, divergence="forward_kl").loss_sum
    # Forward KL: ¾·ln(3/2) + ¼·ln(1/2); gradient p − q = (−¼, ¼).
    assert_close(forward, 0.75 * 0.4054651081081644 - 0.25 * 0.6931471805599453, *sums)
    assert_close(torch.autograd.grad(forward, head)[0][:, 0], [-0.25, 0.25], *sums)


@pytest.mark.numeric
@pytest.mark.parametrize("memory", ["fused", "whole"])
def test_eopd_by_hand_forward_joins_where_the_teacher_is_unsure(memory, assert_close):
    # Two tokens of the same student, (½, ½). Teacher of the first (0.75, 0.25): 0.562 nats; of the second (0.99, 0.01):
    # 0.056. Above 0.5 nats is the first alone: reverse ½·ln(4/3) plus forward ¾·ln(3/2) − ¼·ln 2; the second has its
    # reverse, ½·ln(½/0.99) + ½·ln(½/0.01) = −½·ln(4·0.99·0.01).
    hidden = torch.ones(2, 1, requires_grad=True)
    teacher_head = torch.eye(2)
    teacher = torch.tensor([[0.75, 0.25], [0.99, 0.01]]).log()
    more = {"divergence": "eopd", "memory": memory, "entropy_threshold": 0.5}
    first, second = 0.5 * 0.28768207245178085 + 0.75 * 0.4054651081081644 - 0.25 * 0.6931471805599453, 1.6144645
    head = torch.zeros(2, 1, requires_grad=True)
    for rows, expected in ((slice(0, 1), first), (slice(1, 2), second), (slice(0, 2), first + second)):
        loss = distill_loss(hidden[rows], head, teacher[rows], teacher_head, **more).loss_sum
        assert_close(loss, expected, 1, 2, 2, 2)
    # The first token's logit gradient: −¼·ln 3 − ¼ and its opposite.
    (grad,) = torch.autograd.grad(distill_loss(hidden[:1], head, teacher[:1], teacher_head, **more).loss_sum, head)
    assert_close(grad[:, 0], [-0.25 * 1.0986122886681098 - 0.25, 0.25 * 1.0986122886681098 + 0.25], 1, 2, 2, 1)


def test_below_every_threshold_eopd_is_the_reverse_kl_to_the_last_bit(make_case):
    reverse, gated = (make_case(40, 101, divergence=name) for name in ("reverse_kl", "eopd"))
    gated.entropy_threshold = 100.0
    assert all(torch.equal(a, b) for a, b in zip(reverse.gradients(), gated.gradients(), strict=True))
