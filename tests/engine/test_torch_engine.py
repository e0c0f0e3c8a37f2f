"""The plain engine: one global division, clipping, the learning rate by hand, and a state that survives."""

import copy
import math

import pytest
import torch
from tolerance import close, transformer

from opsd.config import EngineConfig, OptimConfig
from opsd.data.packing import pack
from opsd.distill import distill_loss
from opsd.engine import TorchEngine, learning_rate
from opsd.model.scorer import Scorer

CPU = torch.device("cpu")
# Through the tests' two-layer model and back.
GRADIENT = transformer(2, 16, backward=1)
NO_CLIP = OptimConfig(lr=1e-2, max_grad_norm=0.0)


@pytest.fixture
def rollouts(make_rollout):
    """Three of unequal length, one with tool tokens: 4 + 2 + 1 = 7 student tokens."""
    return [
        make_rollout(0, [6, 7, 8], [9, 10, 11, 12, 1], [True, True, False, True, True]),
        make_rollout(1, [13, 14], [15, 16]),
        make_rollout(2, [20], [21]),
    ]


@pytest.fixture
def make_engine(make_model):
    def make(optim=NO_CLIP, **engine):
        return TorchEngine(Scorer(make_model()), EngineConfig(**engine), optim, CPU)

    return make


@pytest.fixture
def teacher(make_model):
    return Scorer(make_model("llama", False, seed=1))


def backward(engine, teacher, micro, count):
    with torch.no_grad():
        teacher_NE = teacher.hidden(micro)
    head_VE = teacher.model.get_output_embeddings().weight.detach()
    result = engine.forward(
        micro, lambda hidden, head: distill_loss(hidden, head, teacher_NE.to(hidden.dtype), head_VE)
    )
    engine.backward(result.loss_sum, count)
    return result.loss_sum.item()


def gradients(engine):
    return {name: p.grad.clone() for name, p in engine.student.model.named_parameters()}


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.student.model.named_parameters()}


def put_gradients(engine, value):
    for parameter in engine.student.model.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.numeric
def test_the_gradient_is_that_of_the_sum_over_the_count(make_engine, teacher, rollouts):
    # autograd on the sum alone, divided by 7 afterwards
    engine, twin = make_engine(), make_engine()
    (micro,) = pack(rollouts, 100)
    backward(engine, teacher, micro, 7)
    backward(twin, teacher, micro, 1)
    for name, gradient in gradients(engine).items():
        close(gradient, gradients(twin)[name] / 7, *GRADIENT, said=name)


@pytest.mark.numeric
@pytest.mark.parametrize("checkpointing", [False, True])
def test_uneven_micro_batches_give_the_gradient_of_one_batch(make_engine, teacher, rollouts, checkpointing):
    # 7 tokens in one micro-batch, or 4 | 2 + 1, or 4 | 2 | 1: each sum is divided by 7, never by its own count
    whole = make_engine()
    (micro,) = pack(rollouts, 100)
    whole_loss = backward(whole, teacher, micro, 7)
    for budget, sizes in ((7, [4, 3]), (3, [4, 2, 1])):
        split = make_engine(gradient_checkpointing=checkpointing)
        batches = pack(rollouts, budget)
        assert [micro.student_tokens() for micro in batches] == sizes
        losses = [backward(split, teacher, micro, 7) for micro in batches]
        close(sum(losses), whole_loss, *GRADIENT)
        expected = gradients(whole)
        for name, gradient in gradients(split).items():
            close(gradient, expected[name], *GRADIENT, said=name)


@pytest.mark.numeric
def test_the_gradient_norm_is_that_before_clipping_and_the_update_uses_the_clipped_one(make_engine):
    # m parameters with gradient 2 each: norm 2·√m, clipped to 1 by 1/(2·√m). AdamW's first moment is then
    # (1 − β₁)·2/(2·√m) = 0.1/√m
    engine = make_engine(OptimConfig(lr=1e-2, max_grad_norm=1.0))
    put_gradients(engine, 2.0)
    count = sum(p.numel() for p in engine.student.model.parameters())
    close(engine.step(1e-2), 2.0 * math.sqrt(count), count)
    moment = engine.optimizer_state()["model.norm.weight/exp_avg"]
    close(moment, torch.full_like(moment, 0.1 / math.sqrt(count)), count)


@pytest.mark.numeric
def test_a_limit_of_0_does_not_clip(make_engine):
    engine = make_engine(OptimConfig(max_grad_norm=0.0))
    put_gradients(engine, 2.0)
    engine.step(1e-2)
    moment = engine.optimizer_state()["model.norm.weight/exp_avg"]
    close(moment, torch.full_like(moment, 0.2), 1)  # (1 − 0.9)·2


@pytest.mark.numeric
def test_adamw_by_hand_with_decay_on_matrices_only(make_engine):
    # First step, any gradient g > 0: the bias-corrected moments give g/√g² = 1, so w ← w·(1 − lr·decay) − lr
    engine = make_engine(OptimConfig(weight_decay=0.5, max_grad_norm=0.0))
    before = weights(engine)
    put_gradients(engine, 3.0)
    engine.step(0.5)
    for name, after in weights(engine).items():
        kept = 1 - 0.5 * 0.5 if after.dim() >= 2 else 1.0
        close(after, before[name] * kept - 0.5, 1, said=name)


@pytest.mark.numeric
def test_sgd_by_hand_with_decay_on_matrices_only(make_engine):
    # w ← w·(1 − lr·decay) − lr·g: a gradient of 1e-6 stays a step of 1e-8, where Adam would move every weight by lr
    for gradient in (3.0, 1e-6):
        engine = make_engine(OptimConfig(kind="sgd", weight_decay=0.5, max_grad_norm=0.0))
        before = weights(engine)
        put_gradients(engine, gradient)
        engine.step(0.01)
        for name, after in weights(engine).items():
            kept = 1 - 0.01 * 0.5 if after.dim() >= 2 else 1.0
            close(after, before[name] * kept - 0.01 * gradient, 1, said=name)


@pytest.mark.numeric
def test_sgd_takes_the_clipped_gradient_and_keeps_no_state(make_engine):
    # m parameters with gradient 2 each, clipped to norm 1: each is 1/√m
    engine = make_engine(OptimConfig(kind="sgd", max_grad_norm=1.0))
    before = weights(engine)["model.norm.weight"]
    put_gradients(engine, 2.0)
    count = sum(p.numel() for p in engine.student.model.parameters())
    engine.step(50.0)
    close(weights(engine)["model.norm.weight"], before - 50.0 / math.sqrt(count), count)
    assert engine.optimizer_state() == {}
    make_engine(OptimConfig(kind="sgd")).load_optimizer_state({})


@pytest.mark.numeric
def test_the_rate_given_to_step_is_the_rate_used(make_engine):
    # Adam's first step moves each weight by lr, whatever optim.lr says
    engine = make_engine(OptimConfig(lr=123.0, max_grad_norm=0.0))
    before = weights(engine)["model.norm.weight"]
    put_gradients(engine, 1.0)
    engine.step(0.25)
    close(weights(engine)["model.norm.weight"], before - 0.25, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_norm_that_is_not_finite_leaves_weights_and_moments_alone(make_engine, bad, limit):
    engine = make_engine(OptimConfig(max_grad_norm=limit))
    put_gradients(engine, 1.0)
    engine.step(1e-2)
    before, moments = weights(engine), copy.deepcopy(engine.optimizer_state())
    put_gradients(engine, 1.0)
    engine.student.model.get_parameter("model.norm.weight").grad[0] = bad
    assert not math.isfinite(engine.step(1e-2))
    assert all(torch.equal(now, before[name]) for name, now in weights(engine).items())
    assert all(torch.equal(now, moments[name]) for name, now in engine.optimizer_state().items())
    assert all(p.grad is None for p in engine.student.model.parameters())  # the bad gradient is gone


@pytest.mark.numeric
def test_gradients_are_cleared_after_a_step(make_engine, teacher, rollouts):
    engine = make_engine()
    (micro,) = pack(rollouts, 100)
    backward(engine, teacher, micro, 7)
    engine.step(0.0)
    backward(engine, teacher, micro, 7)
    once = gradients(engine)
    backward(engine, teacher, micro, 7)  # without a step between, gradients add up
    for name, gradient in gradients(engine).items():
        close(gradient, 2 * once[name], *GRADIENT, said=name)


def test_optimiser_state_carried_over_gives_bit_identical_next_steps(make_engine, make_model, teacher, rollouts):
    optim = OptimConfig(lr=1e-2, weight_decay=0.1)
    first = make_engine(optim)
    batches = pack(rollouts, 7)

    def steps(engine, count):
        for _ in range(count):
            for micro in batches:
                backward(engine, teacher, micro, 7)
            engine.step(1e-2)

    steps(first, 2)
    tensors = copy.deepcopy(first.optimizer_state())
    model = make_model()
    model.load_state_dict(first.student.model.state_dict())
    second = TorchEngine(Scorer(model), EngineConfig(), optim, CPU)
    second.load_optimizer_state(tensors)
    steps(first, 2), steps(second, 2)
    assert all(torch.equal(now, weights(first)[name]) for name, now in weights(second).items())
    ours, theirs = first.optimizer_state(), second.optimizer_state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_fresh_engines_state_is_empty_and_can_be_loaded(make_engine):
    assert make_engine().optimizer_state() == {}
    make_engine().load_optimizer_state({})


@pytest.mark.numeric
def test_bfloat16_computes_in_bfloat16_on_fp32_weights(make_engine, teacher, rollouts):
    engine, exact = make_engine(dtype="bfloat16"), make_engine()
    (micro,) = pack(rollouts, 100)
    seen = []
    engine.forward(micro, lambda hidden, head: seen.extend((hidden.dtype, head.weight_VD.dtype)))
    assert seen == [torch.bfloat16, torch.float32]
    # The model's own layers under autocast, then fp32 logits of what came out in bfloat16.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = exact.student.hidden(micro).bfloat16().float()
    head = exact.student.model.get_output_embeddings().weight.detach().bfloat16().float()
    teacher_NE = teacher.hidden(micro).detach().bfloat16().float()
    teacher_VE = teacher.model.get_output_embeddings().weight.detach().bfloat16().float()
    log_p, log_q = (hidden @ head.T).log_softmax(-1), (teacher_NE @ teacher_VE.T).log_softmax(-1)
    loss = backward(engine, teacher, micro, 7)
    close(loss, (log_p.exp() * (log_p - log_q)).sum(), 16, 52, 7)
    # A rounding to bfloat16 is off by 2^-8, and some fifty lie on the way: √50·2^-8 = 3 %.
    assert loss == pytest.approx(backward(exact, teacher, micro, 7), rel=0.05)
    expected = gradients(exact)
    for name, gradient in gradients(engine).items():
        assert gradient.dtype == torch.float32
        assert float((gradient - expected[name]).norm()) < 0.1 * float(expected[name].norm()), name
    before = weights(engine)
    engine.step(1e-6)  # far below bfloat16's resolution: only fp32 weights can take such a step
    assert not torch.equal(weights(engine)["model.norm.weight"], before["model.norm.weight"])


def test_one_process_sums_to_its_own_value(make_engine):
    engine = make_engine()
    assert (engine.ranks.rank, engine.ranks.world_size, engine.ranks.sum(2.5)) == (0, 1, 2.5)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 2.5),  # warm-up over 4 steps: 10·1/4
        (2, 5.0),
        (4, 10.0),  # the peak
        (5, 10.0),  # cosine starts: progress 0/6
        (8, 5.5),  # progress 3/6: cosine 0.5 → 10·(0.1 + 0.9·0.5)
        (10, 1.602886),  # the last step: progress 5/6, cosine (1 − 0.866025)/2 = 0.066987 → 10·(0.1 + 0.060289)
    ],
)
def test_learning_rate_by_hand(step, expected):
    optim = OptimConfig(lr=10.0, warmup_steps=4, min_lr_fraction=0.1)
    assert learning_rate(step, 10, optim) == pytest.approx(expected, rel=1e-6)  # the digits above


def test_learning_rate_without_warm_up_starts_at_its_peak_and_constant_stays_there():
    assert learning_rate(1, 10, OptimConfig(lr=2.0)) == 2.0
    constant = OptimConfig(lr=2.0, schedule="constant", warmup_steps=2)
    assert [learning_rate(step, 4, constant) for step in (1, 2, 3, 4)] == [1.0, 2.0, 2.0, 2.0]


def test_learning_rate_is_never_0_within_a_run_and_warm_up_may_fill_it():
    assert all(learning_rate(step, 5, OptimConfig(lr=1.0)) > 0 for step in range(1, 6))
    assert learning_rate(5, 5, OptimConfig(lr=1.0, warmup_steps=5)) == 1.0
    assert learning_rate(1, 1, OptimConfig(lr=1.0)) == 1.0
