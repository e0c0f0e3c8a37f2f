"""Streamed statistics against their definitions in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.distill import concatenate_stats
from opsd.utils.errors import UserError

REQUIRED = ("entropy_N", "reverse_kl_N", "forward_kl_N", "teacher_entropy_N", "top1_agree_N")
ALL = (*REQUIRED, "teacher_rank_N", "grad_norm_N", "teacher_mass_N", "log_ratio_N")


@pytest.mark.numeric
@settings(max_examples=80, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 7, 40]),
    vocab=st.sampled_from([1, 2, 17, 101, 257]),
    pads=st.sampled_from([(0, 0, False), (4, 0, False), (0, 3, False), (4, 3, True)]),
    temperature=st.sampled_from([1.0, 0.6, 2.0]),
    chunk_tokens=st.sampled_from(["auto", 1, 3, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    needs=st.sets(st.sampled_from(ALL)),
    seed=st.integers(0, 2**20),
)
def test_any_set_of_fields_is_the_definition(
    tokens, vocab, pads, temperature, chunk_tokens, dtype, needs, seed, make_case, naive, assert_close
):
    student_pad, teacher_pad, explicit = pads
    case = make_case(
        tokens,
        vocab,
        student_pad=student_pad,
        teacher_pad=teacher_pad,
        vocab_size=vocab if explicit else None,
        temperature=temperature,
        dtype=dtype,
        seed=seed,
    )
    token_ids_N = torch.arange(tokens) % vocab
    stats = case.stats(needs=frozenset(needs), chunk_tokens=chunk_tokens, token_ids_N=token_ids_N)
    expected = naive.stats(case, token_ids_N)
    size = float(expected["size"].max()) if tokens else 0.0
    for name in ALL:
        found = getattr(stats, name)
        if name not in needs:
            assert found is None
        elif name in ("top1_agree_N", "teacher_rank_N"):
            assert torch.equal(found, expected[name])
        else:
            assert found.dtype == torch.float32
            assert not found.requires_grad
            assert_close(found, expected[name], *case.sums, size=size, cancels=True)


@pytest.mark.numeric
def test_without_a_wish_the_five_required_fields_are_computed(make_case, naive, assert_close):
    case = make_case(1000, 1009)
    stats = case.stats(rollout_N=torch.arange(1000) // 100)
    expected = naive.stats(case)
    for name in REQUIRED[:4]:
        assert_close(getattr(stats, name), expected[name], *case.sums)
    assert torch.equal(stats.top1_agree_N, expected["top1_agree_N"])
    assert stats.teacher_rank_N is None
    assert stats.grad_norm_N is None
    assert stats.rollout_N.tolist() == [row // 100 for row in range(1000)]
    assert stats.vocab_size == 1009


def test_statistics_record_no_graph_even_of_inputs_that_want_gradients(make_case):
    case = make_case(4, 20)
    assert case.student_ND.requires_grad
    assert not any(getattr(case.stats(), name).requires_grad for name in REQUIRED)


def test_entropy_alone_projects_the_student_once_and_the_teacher_never(make_case, flops):
    case = make_case(12, 40)
    case.teacher_NE = torch.full_like(case.teacher_NE, float("nan"))
    # 2 · N · V · D
    assert flops(lambda: case.stats(needs=frozenset({"entropy_N"}))) == 2 * 12 * 40 * 8
    assert torch.isfinite(case.stats(needs=frozenset({"entropy_N"})).entropy_N).all()


def test_all_fields_cost_one_projection_of_each_model(make_case, flops):
    case = make_case(12, 40)
    token_ids_N = torch.zeros(12, dtype=torch.int64)
    work = flops(lambda: case.stats(needs=frozenset(ALL), token_ids_N=token_ids_N))
    assert work == 2 * 12 * 40 * (8 + 6)


def test_fields_known_without_logits_cost_nothing(make_case, flops):
    case = make_case(12, 40)
    needs = frozenset({"rollout_N", "token_ids_N", "vocab_size"})
    assert flops(lambda: case.stats(needs=needs, token_ids_N=torch.arange(12))) == 0
    assert case.stats(needs=needs, token_ids_N=torch.arange(12)).token_ids_N.tolist() == list(range(12))


@pytest.mark.numeric
def test_a_uniform_student_and_a_two_token_teacher_by_hand(make_case, assert_close):
    # Four tokens: student uniform, H = ln 4. Teacher (½, ½, ~0, ~0) by logits (40, 40, 0, 0): H = ln 2.
    # Reverse KL: Σ ¼·(ln ¼ − log q) = −ln 4 + (2·ln 2 + 2·(40 + ln 2))/4 = 20 − ln 2. Forward: ln 4 − ln 2 = ln 2.
    case = make_case(1, 4, width=1, teacher_width=1)
    case.student_ND, case.student_head_VD = torch.ones(1, 1), torch.zeros(4, 1)
    case.teacher_NE, case.teacher_head_VE = torch.ones(1, 1), torch.tensor([[40.0], [40.0], [0.0], [0.0]])
    stats = case.stats(needs=frozenset(ALL), token_ids_N=torch.tensor([2]))
    ln2 = 0.6931471805599453
    assert_close(stats.entropy_N, [2 * ln2], *case.sums)
    assert_close(stats.teacher_entropy_N, [ln2], *case.sums)
    assert_close(stats.reverse_kl_N, [20 - ln2], *case.sums)
    assert_close(stats.forward_kl_N, [ln2], *case.sums)
    # Token 2 stands behind the teacher's two; the student's logit gradient is ¼·(r − kl), r − kl = ∓20: norm ¼·20·2.
    assert int(stats.teacher_rank_N) == 2
    assert_close(stats.grad_norm_N, [10.0], *case.sums)
    # All four tokens are among the student's sixteen likeliest. log q − log p = (−40 − ln 2) + ln 4.
    assert_close(stats.teacher_mass_N, [1.0], *case.sums)
    assert_close(stats.log_ratio_N, [ln2 - 40], *case.sums)


@pytest.mark.numeric
def test_the_teachers_mass_on_the_students_sixteen_likeliest_tokens_by_hand(make_case, assert_close):
    # Twenty tokens, token v has the student's logit v: its likeliest are 4 to 19. The teacher's weights are 3 for the
    # tokens 0 to 3 and 1 for the others: 16 / (12 + 16).
    case = make_case(1, 20, width=1, teacher_width=1)
    case.student_ND, case.student_head_VD = torch.ones(1, 1), torch.arange(20.0)[:, None]
    case.teacher_NE, case.teacher_head_VE = torch.ones(1, 1), torch.tensor([3.0] * 4 + [1.0] * 16).log()[:, None]
    stats = case.stats(needs=frozenset({"teacher_mass_N"}))
    assert_close(stats.teacher_mass_N, [16 / 28], *case.sums)


@pytest.mark.numeric
def test_joined_micro_batches_are_one(make_case, assert_close):
    case = make_case(9, 20)
    parts = []
    for rows in (slice(0, 4), slice(4, 4), slice(4, 9)):
        part = make_case(9, 20)
        part.student_ND, part.teacher_NE = case.student_ND[rows], case.teacher_NE[rows]
        parts.append(part.stats(rollout_N=torch.arange(9)[rows]))
    joined, whole = concatenate_stats(parts), case.stats(rollout_N=torch.arange(9))
    assert torch.equal(joined.rollout_N, whole.rollout_N)
    assert_close(joined.reverse_kl_N, whole.reverse_kl_N, *case.sums)
    assert torch.equal(joined.top1_agree_N, whole.top1_agree_N)
    assert joined.vocab_size == 20
    assert joined.teacher_rank_N is None


def test_a_field_that_one_micro_batch_lacks_is_not_joined(make_case):
    case = make_case(3, 20)
    joined = concatenate_stats([case.stats(), case.stats(needs=frozenset({"entropy_N"}))])
    assert joined.entropy_N.shape == (6,)
    assert joined.reverse_kl_N is None


def test_joining_no_micro_batch_is_refused():
    with pytest.raises(UserError, match="no statistics to join"):
        concatenate_stats([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"needs": frozenset({"entropie_N"})}, "unknown statistic 'entropie_N'"),
        ({"needs": frozenset({"teacher_rank_N"})}, "teacher_rank_N needs the sampled tokens: give token_ids_N"),
        ({"needs": frozenset({"log_ratio_N"})}, "log_ratio_N needs the sampled tokens: give token_ids_N"),
        (
            {"needs": frozenset({"teacher_rank_N"}), "token_ids_N": torch.tensor([0, 1, 20])},
            "token_ids_N reach beyond the shared vocabulary of 20",
        ),
        (
            {"needs": frozenset({"teacher_rank_N"}), "token_ids_N": torch.tensor([0, 1, -1])},
            "token_ids_N reach beyond the shared vocabulary of 20",
        ),
        ({"rollout_N": torch.zeros(2)}, r"rollout_N has shape \(2,\) for 3 tokens"),
        ({"chunk_tokens": -1}, "chunk_tokens -1: give a number of tokens from 1, or 'auto'"),
    ],
)
def test_wishes_that_cannot_be_met_are_named(options, message, make_case):
    with pytest.raises(UserError, match=message):
        make_case(3, 20).stats(**options)
