"""The element-wise work on rows of logits as Triton kernels: one program per token reads both models' logits once.

For fp32 logits on CUDA; `triton_rows.py` starts them. Never imported without triton. The maths is that of
`opsd/distill/divergence.py`: a constant shift of a row is removed before anything is summed, and terms that vanish
(a logit of -inf) add 0, while NaN stays NaN. `tl.maximum` would lose NaN on a GPU, so `tl.where` is used instead.

Legend: C rows, W width of a row (`row_width`); s student, t teacher, u = s - t; p = P_S, q = P_T; lanes: a row's
entries that are BLOCK apart, summed in parallel and joined at the end. S, T: hidden·headᵀ + bias of either model;
S_AT, T_AT: which row of them a program reads. Logits over the temperature are s_outer·x, or s_outer·tanh(s_inner·x)
if S_CAPPED (t_… for the teacher); V: how many entries of a row belong to the vocabulary.
"""

# Kernels are not ordinary Python: only Triton's compiler knows their types.
# pyrefly: ignore-errors[unbound-name]

from __future__ import annotations

import triton
import triton.language as tl

# Entries of a row per step. Pass 1 then takes 64 registers per thread (80 with the rank), and four programs of eight
# warps on a multiprocessor keep 32 KB of reads in flight; with 2048 it spills. The gradient has no sums to keep.
STATISTICS_BLOCK, GRADIENT_BLOCK = 1024, 4096
WARPS, STAGES = 8, 2
# What pass 1 writes for each row, in the order of its output's lines.
NAMES = (
    "reverse_kl_N",
    "forward_kl_N",
    "entropy_N",
    "teacher_entropy_N",
    "top1_agree_N",
    "teacher_rank_N",
    "student_max",
    "student_sum",
    "teacher_max",
    "teacher_sum",
    "mean_u",
)
AGREE, RANK = (tl.constexpr(NAMES.index(name)) for name in ("top1_agree_N", "teacher_rank_N"))
S_MAX, S_SUM, T_MAX, T_SUM, MEAN_U = (
    tl.constexpr(NAMES.index(name)) for name in ("student_max", "student_sum", "teacher_max", "teacher_sum", "mean_u")
)
# Below every logit, and finite: FLOOR - max is not NaN.
FLOOR = tl.constexpr(-3.0e38)


@triton.jit
def _add(x, u, top, z, e, w):
    """Add a block to a model's lanes: top = max, z = Σ exp(x-top), e = Σ exp(x-top)·(x-top), w = Σ exp(x-top)·u."""
    d = x - top
    small = tl.exp(-tl.abs(d))  # one exponential serves both cases: the other factor is 1
    higher = d > 0.0
    p, shrink = tl.where(higher, 1.0, small), tl.where(higher, small, 1.0)
    here = p > 0.0  # a logit of -inf adds nothing, whatever u is; NaN comes through p
    e = tl.where(higher, small * (e - d * z), e + p * tl.where(here, d, 0.0))
    return tl.where(higher, x, top), shrink * z + p, e, shrink * w + p * tl.where(here, u, 0.0)


@triton.jit
def _join(top, z, e, w):
    """Join a model's lanes into one row: max, Σ exp, entropy, Σ p·u."""
    best = tl.max(top, 0)
    shrink = tl.exp(top - best)
    total = tl.sum(z * shrink, 0)
    below = tl.sum(shrink * (e + (top - best) * z), 0) / total
    return best, total, _floor0(tl.log(total) - below), tl.sum(w * shrink, 0) / total


@triton.jit
def _floor0(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _offset(x):
    """Roughly the largest logit of a row, from its first block; any finite number would do."""
    best = tl.max(x, 0)
    return tl.where(tl.abs(best) < 1.0e29, best, 0.0)


@triton.jit
def _tanh(x):
    """tanh, and its derivative."""
    e = tl.exp(-2.0 * tl.abs(x))
    one = 1.0 + e
    far = tl.where(x < 0.0, e - 1.0, 1.0 - e) / one
    # For a small x, 1 - e has few digits left.
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, far), 4.0 * e / (one * one)


@triton.jit
def _logits(x, at, V, inner, outer, CAPPED: tl.constexpr):
    """Logits over the temperature; the padding beyond the vocabulary is not capped, so that it stays far below."""
    if CAPPED:
        tanh, _ = _tanh(x * inner)
        return tl.where(at < V, tanh * outer, x)
    return x * outer


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    S, T, S_AT, T_AT, IDS, OUT, rows, W, V, stride, s_inner, s_outer, t_inner, t_outer,
    TEACHER: tl.constexpr, RANKED: tl.constexpr, S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pass 1, a program per row: OUT [11, rows] in the order of NAMES."""
    row = tl.program_id(0)
    s_row, t_row = S + tl.load(S_AT + row) * stride, T + tl.load(T_AT + row) * stride
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    s_top, s_z, s_e, s_w = zero + FLOOR, zero, zero, zero
    t_top, t_z, t_e, t_w = zero + FLOOR, zero, zero, zero
    first = tl.zeros([BLOCK], tl.int32)
    above = tl.zeros([BLOCK], tl.int32)
    s = tl.load(s_row + lane, mask=lane < W, other=-float("inf"))
    s_off = _offset(_logits(s, lane, V, s_inner, s_outer, S_CAPPED))
    if TEACHER:
        t = tl.load(t_row + lane, mask=lane < W, other=-float("inf"))
        t_off = _offset(_logits(t, lane, V, t_inner, t_outer, T_CAPPED))
    if RANKED:
        own = tl.load(IDS + row)
        t_own = _logits(tl.load(t_row + own), own, V, t_inner, t_outer, T_CAPPED)
    for start in tl.range(0, W, BLOCK, num_stages=STAGES):
        at = start + lane
        s = _logits(tl.load(s_row + at, mask=at < W, other=-float("inf")), at, V, s_inner, s_outer, S_CAPPED)
        u = zero
        if TEACHER:
            t = _logits(tl.load(t_row + at, mask=at < W, other=-float("inf")), at, V, t_inner, t_outer, T_CAPPED)
            first = tl.where(s > s_top, at, first)
            u = (s - s_off) - (t - t_off)
            t_top, t_z, t_e, t_w = _add(t, u, t_top, t_z, t_e, t_w)
        if RANKED:
            above += (t > t_own).to(tl.int32)
        s_top, s_z, s_e, s_w = _add(s, u, s_top, s_z, s_e, s_w)
    s_max, s_sum, s_entropy, s_u = _join(s_top, s_z, s_e, s_w)
    tl.store(OUT + 2 * rows + row, s_entropy)
    tl.store(OUT + S_MAX * rows + row, s_max)
    tl.store(OUT + S_SUM * rows + row, s_sum)
    if TEACHER:
        t_max, t_sum, t_entropy, t_u = _join(t_top, t_z, t_e, t_w)
        # As if both rows had been centred on their own maximum.
        apart = (s_max - s_off) - (t_max - t_off)
        normalisers = tl.log(s_sum) - tl.log(t_sum)
        tl.store(OUT + row, _floor0((s_u - apart) - normalisers))
        tl.store(OUT + rows + row, _floor0(normalisers - (t_u - apart)))
        tl.store(OUT + 3 * rows + row, t_entropy)
        tl.store(OUT + T_MAX * rows + row, t_max)
        tl.store(OUT + T_SUM * rows + row, t_sum)
        tl.store(OUT + MEAN_U * rows + row, s_u - apart)
        mode = tl.min(tl.where(s_top == s_max, first, 2147483647), 0)  # the first of equals, as argmax
        at_mode = tl.load(t_row + mode, mask=mode < W, other=-float("inf"))
        at_mode = _logits(at_mode, mode, V, t_inner, t_outer, T_CAPPED)
        # A row with NaN agrees with nothing: the maximum does not show NaN, the sum does.
        agree = (at_mode == t_max) & (t_sum == t_sum) & (s_sum == s_sum)
        tl.store(OUT + AGREE * rows + row, agree.to(tl.float32))
    if RANKED:
        tl.store(OUT + RANK * rows + row, tl.sum(above, 0).to(tl.float32))


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    S, T, S_AT, T_AT, ROW, OUT, rows, W, V, stride, s_inner, s_outer, t_inner, t_outer, inv_temp,
    S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [rows] = ‖p·(u - Σ p·u)‖/T, from what pass 1 left in ROW."""
    row = tl.program_id(0)
    s_row, t_row = S + tl.load(S_AT + row) * stride, T + tl.load(T_AT + row) * stride
    s_max, s_sum = tl.load(ROW + S_MAX * rows + row), tl.load(ROW + S_SUM * rows + row)
    t_max, mean = tl.load(ROW + T_MAX * rows + row), tl.load(ROW + MEAN_U * rows + row)
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, W, BLOCK, num_stages=STAGES):
        at = start + lane
        s = _logits(tl.load(s_row + at, mask=at < W, other=-float("inf")), at, V, s_inner, s_outer, S_CAPPED)
        t = _logits(tl.load(t_row + at, mask=at < W, other=-float("inf")), at, V, t_inner, t_outer, T_CAPPED)
        p = tl.exp(s - s_max)
        g = tl.where(p > 0.0, p * (((s - s_max) - (t - t_max)) - mean), 0.0)
        squares += g * g
    tl.store(OUT + row, tl.sqrt(tl.sum(squares, 0)) / s_sum * inv_temp)


@triton.jit
def _softplus(x):
    """ln(1 + e^x) and ln(1 + e^-x)."""
    y = tl.exp(-tl.abs(x))
    # ln(1 + y), accurate for a small y: the rounding of 1 + y cancels.
    one = 1.0 + y
    least = tl.where(one == 1.0, y, tl.log(one) * (y / (one - 1.0)))
    return tl.where(x > 0.0, x, 0.0) + least, tl.where(x < 0.0, -x, 0.0) + least


@triton.jit(do_not_specialize=["rows"])
def jsd_kernel(
    S, T, S_AT, T_AT, ROW, OUT, rows, W, V, stride, s_inner, s_outer, t_inner, t_outer, logit_beta,
    S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [2, rows] = Σ p·softplus(x), Σ q·softplus(-x), with x = log q - log p + log(beta/(1-beta))."""
    row = tl.program_id(0)
    s_row, t_row = S + tl.load(S_AT + row) * stride, T + tl.load(T_AT + row) * stride
    s_max, s_sum = tl.load(ROW + S_MAX * rows + row), tl.load(ROW + S_SUM * rows + row)
    t_max, t_sum = tl.load(ROW + T_MAX * rows + row), tl.load(ROW + T_SUM * rows + row)
    shift = (tl.log(s_sum) - tl.log(t_sum)) + logit_beta
    lane = tl.arange(0, BLOCK)
    of_p, of_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, W, BLOCK, num_stages=STAGES):
        at = start + lane
        s = tl.load(s_row + at, mask=at < W, other=-float("inf"))
        t = tl.load(t_row + at, mask=at < W, other=-float("inf"))
        s = _logits(s, at, V, s_inner, s_outer, S_CAPPED) - s_max
        t = _logits(t, at, V, t_inner, t_outer, T_CAPPED) - t_max
        soft, minus = _softplus((t - s) + shift)
        p, q = tl.exp(s), tl.exp(t)
        of_p += tl.where(p > 0.0, p * soft, 0.0)
        of_q += tl.where(q > 0.0, q * minus, 0.0)
    # The comparisons drop a term of NaN, but the mass that divides keeps it.
    tl.store(OUT + row, tl.sum(of_p, 0) / s_sum)
    tl.store(OUT + rows + row, tl.sum(of_q, 0) / t_sum)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    S, T, S_AT, T_AT, ROW, JSD, SCALE, OUT, rows, W, V, stride, out_stride, s_inner, s_outer, t_inner, t_outer,
    logit_beta, DIVERGENCE: tl.constexpr, S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 2, grid (rows, blocks of W): gradient·SCALE[row] into OUT, which may be S if no rows are picked."""
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < W
    s_max, s_sum = tl.load(ROW + S_MAX * rows + row), tl.load(ROW + S_SUM * rows + row)
    t_max, t_sum = tl.load(ROW + T_MAX * rows + row), tl.load(ROW + T_SUM * rows + row)
    s_at, t_at = S + tl.load(S_AT + row) * stride + at, T + tl.load(T_AT + row) * stride + at
    x = tl.load(s_at, mask=live, other=-float("inf"))
    s = _logits(x, at, V, s_inner, s_outer, S_CAPPED) - s_max
    t = _logits(tl.load(t_at, mask=live, other=-float("inf")), at, V, t_inner, t_outer, T_CAPPED) - t_max
    scale = tl.load(SCALE + row)
    p = tl.exp(s)
    if DIVERGENCE == "reverse_kl":
        g = tl.where(p > 0.0, p * ((s - t) - tl.load(ROW + MEAN_U * rows + row)), 0.0) * (scale / s_sum)
    elif DIVERGENCE == "forward_kl":
        g = (p / s_sum - tl.exp(t) / t_sum) * scale
    elif DIVERGENCE == "eopd":  # JSD: 1 where the forward KL is added, else 0
        gate = tl.load(JSD + row)
        mean = tl.load(ROW + MEAN_U * rows + row) - gate
        g = tl.where(p > 0.0, p * ((s - t) - mean), 0.0) * (scale / s_sum) - tl.exp(t) * (gate * scale / t_sum)
    else:  # jsd, whose SCALE has the factor 1-beta
        shift = (tl.log(s_sum) - tl.log(t_sum)) + logit_beta
        soft, _ = _softplus((t - s) + shift)
        g = tl.where(p > 0.0, p * (tl.load(JSD + row) - soft), 0.0) * (scale / s_sum)
    if S_CAPPED:
        _, slope = _tanh(x * s_inner)
        g = g * slope
    tl.store(OUT + row.to(tl.int64) * out_stride + at, g.to(OUT.dtype.element_ty), mask=live)
