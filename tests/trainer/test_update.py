"""One update: what is summed, what it is divided by, and what must not change it.

Legend as in opsd.update. `Recorder` keeps the gradient that the optimiser would have used.
"""

import math

import pytest
import torch
from tolerance import close, transformer

from bench.updates import trainer_of
from opsd.config import EngineConfig, LossConfig, OptimConfig
from opsd.data import packing as batch
from opsd.data.packing import empty, pack
from opsd.engine import TorchEngine
from opsd.model.scorer import Scorer
from opsd.selection import STATISTICS, Selection, load_selector
from opsd.teacher import LocalTeacher
from opsd.utils.errors import RunStopped, StepUnusable

CPU = torch.device("cpu")
# Through the tests' two-layer model, its 49 tokens and a batch of 35, and back.
LOSS = (*transformer(2, 16), 49, 35)
GRADIENT = (*transformer(2, 16, backward=1), 49, 35)
LENGTHS = [1, 9, 4, 7, 12, 2]
SELECTORS = [
    ("all", {}),
    ("entropy", {}),
    ("divergence", {}),
    ("random", {}),
    ("entropy_sample", {}),
    ("soft_or", {"normalise_over": "rollout"}),
    ("soft_or", {"normalise_over": "batch"}),
    ("q3", {"normalise_over": "batch"}),
]


class Recorder(TorchEngine):
    """Keeps the gradients instead of stepping with them."""

    gradients: dict[str, torch.Tensor]

    def step(self, lr):
        self.gradients = {name: p.grad.clone() for name, p in self.student.model.named_parameters()}
        self.student.model.zero_grad()
        return float(torch.stack([g.norm() for g in self.gradients.values()]).norm())


class Learner:
    """Student, teacher and rollouts of uneven lengths, ready to update."""

    def __init__(self, make_model, make_rollout, teacher_seed=1, engine=Recorder, packed=False):
        generator = torch.Generator().manual_seed(5)

        def ids(count):
            return torch.randint(6, 49, (count,), generator=generator).tolist()

        self.rollouts = [make_rollout(n, ids(3 + n % 2), ids(length)) for n, length in enumerate(LENGTHS)]
        self.engine = engine(Scorer(make_model(seed=0), packed), EngineConfig(), OptimConfig(lr=1e-2), CPU)
        self.teacher = LocalTeacher(Scorer(make_model(seed=teacher_seed)), CPU)

    def run(
        self, by="all", max_tokens=1000, watch=frozenset(), step=3, loss=None, selector=None, weights=None, **options
    ):
        if selector is None:
            selector = None if by == "all" else load_selector(by, retention=0.5, **options)
        trainer = trainer_of(self.engine, self.teacher, selector, loss, optim=OptimConfig(lr=1e-2, schedule="constant"))
        batches = pack(self.rollouts, max_tokens)
        return trainer.update(batches, self.teacher.hidden(batches), step, watch, weights)

    def weights(self):
        return {name: p.detach().clone() for name, p in self.engine.student.model.named_parameters()}


@pytest.fixture
def learner(make_model, make_rollout):
    return Learner(make_model, make_rollout)


def assert_equal(ours, theirs):
    for name in theirs:
        close(ours[name], theirs[name], *GRADIENT, said=name)


@pytest.mark.numeric
@pytest.mark.parametrize(("by", "options"), SELECTORS)
@pytest.mark.parametrize("change", [{"max_tokens": 16}, {"max_tokens": 30}, {"loss": LossConfig(chunk_tokens=3)}])
def test_packing_and_chunk_size_change_neither_loss_nor_gradient(learner, by, options, change):
    one = learner.run(by, **options)
    expected = learner.engine.gradients
    other = learner.run(by, **options, **change)
    close(other.loss_nats, one.loss_nats, *LOSS)
    assert (other.kept, other.tokens) == (one.kept, one.tokens)
    assert_equal(learner.engine.gradients, expected)


@pytest.mark.numeric
@pytest.mark.parametrize("checkpointing", [False, True])
def test_neither_packing_nor_groups_of_lengths_change_loss_or_gradient(
    learner, make_model, make_rollout, monkeypatch, checkpointing
):
    other = Learner(make_model, make_rollout, packed=True)
    if checkpointing:
        learner.engine.student.model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = other.run("soft_or", normalise_over="batch")
    for padding in (0, 8, 1000):
        monkeypatch.setattr(batch, "PADDING_TOKENS", padding)
        result = learner.run("soft_or", normalise_over="batch")
        close(result.loss_nats, expected.loss_nats, *LOSS)
        assert torch.equal(result.kept_N, expected.kept_N)
        assert_equal(learner.engine.gradients, other.engine.gradients)


def forwards(learner, monkeypatch, **options):
    """How often an update calls the student, and on how many micro-batches."""
    calls, whole = [], learner.engine.student.forward
    monkeypatch.setattr(learner.engine.student, "forward", lambda *given: calls.append(given[0]) or whole(*given))
    learner.run(**options)
    return len(calls), len(pack(learner.rollouts, options.get("max_tokens", 1000)))


@pytest.mark.parametrize(("by", "options"), SELECTORS)
@pytest.mark.parametrize("watch", [frozenset(), frozenset(STATISTICS)], ids=["", "watched"])
def test_a_step_of_one_micro_batch_calls_the_student_once(learner, monkeypatch, by, options, watch):
    assert forwards(learner, monkeypatch, by=by, **options, watch=watch) == (1, 1)


@pytest.mark.parametrize("scope", ["micro_batch", "rollout", "running"])
@pytest.mark.parametrize("watch", [frozenset(), frozenset(STATISTICS)], ids=["", "watched"])
def test_a_choice_that_needs_no_sight_of_the_step_calls_the_student_once_per_micro_batch(
    learner, monkeypatch, scope, watch
):
    calls, batches = forwards(learner, monkeypatch, by="soft_or", normalise_over=scope, max_tokens=16, watch=watch)
    assert calls == batches > 1


def test_a_choice_over_several_micro_batches_scores_each_once_more(learner, monkeypatch):
    calls, batches = forwards(learner, monkeypatch, by="soft_or", normalise_over="batch", max_tokens=16)
    assert calls == 2 * batches > 2


class KeepsUncertain:
    """Keeps what is above a fixed entropy: how many tokens that are, nobody knows beforehand."""

    needs, needs_kept = frozenset({"entropy_N"}), frozenset()
    normalise_over, fixed_budget = "micro_batch", False

    def __init__(self, above):
        self.above = above

    def budget(self, tokens):
        raise AssertionError("has no budget")

    def prepare(self, stats):
        raise AssertionError("normalises nothing")

    def __call__(self, stats, seed=0):
        return Selection(stats.entropy_N > self.above)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


@pytest.mark.numeric
def test_a_count_that_is_known_after_the_choice_alone_divides_the_loss(learner, monkeypatch):
    two_passes = learner.run(selector=KeepsUncertain(3.4), max_tokens=16)
    expected = learner.engine.gradients
    one_pass = learner.run(selector=KeepsUncertain(3.4))
    assert 0 < one_pass.kept == two_passes.kept < 35
    close(one_pass.loss_nats, two_passes.loss_nats, *LOSS)
    assert_equal(learner.engine.gradients, expected)
    with pytest.raises(StepUnusable, match="the selector kept none"):
        learner.run(selector=KeepsUncertain(99.0))


@pytest.mark.numeric
def test_the_loss_is_the_mean_over_tokens_never_a_mean_of_means(learner):
    result = learner.run(max_tokens=16)
    # Where all tokens are trained on, the statistic is the loss's own: so it is taken from an update that selects.
    scored = learner.run("random", watch=frozenset({"reverse_kl_N"}), max_tokens=16)
    kl_N, rollout_N = scored.stats.reverse_kl_N, scored.stats.rollout_N
    assert kl_N is not None and kl_N.numel() == sum(LENGTHS) == 35
    close(result.loss_nats, kl_N.sum() / 35, 35)
    mean_of_means = sum(float(kl_N[rollout_N == n].mean()) for n in range(6)) / 6
    assert abs(result.loss_nats - mean_of_means) > 1e-3  # the two differ here, so the line above can fail


@pytest.mark.numeric
def test_a_selected_loss_is_divided_by_the_kept_count(learner):
    result = learner.run("entropy", watch=frozenset({"reverse_kl_N"}))
    # ⌊m/2⌋ of 1, 9, 4, 7, 12, 2 tokens, at least one: 1 + 4 + 2 + 3 + 6 + 1
    assert result.kept == 17 and int(result.kept_N.sum()) == 17
    close(result.loss_nats, result.stats.reverse_kl_N[result.kept_N].sum() / 17, 49, 17)


@pytest.mark.parametrize(("by", "options"), SELECTORS)
def test_watching_changes_nothing_that_is_trained(learner, by, options):
    unwatched = learner.run(by, **options, max_tokens=16)
    expected = learner.engine.gradients
    watched = learner.run(by, **options, max_tokens=16, watch=frozenset(STATISTICS))
    assert watched.loss_nats == unwatched.loss_nats
    assert torch.equal(watched.kept_N, unwatched.kept_N)
    assert all(torch.equal(learner.engine.gradients[name], expected[name]) for name in expected)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(make_model, make_rollout):
    learner = Learner(make_model, make_rollout, teacher_seed=0)
    result = learner.run("soft_or", normalise_over="batch")
    assert (result.loss_nats, result.grad_norm) == (0.0, 0.0)


@pytest.mark.parametrize(("by", "options"), SELECTORS)
def test_two_steps_lower_the_divergence_on_a_fixed_batch(make_model, make_rollout, by, options):
    learner = Learner(make_model, make_rollout, engine=TorchEngine)
    watch = frozenset({"reverse_kl_N"})
    first, second, third = (learner.run(by, **options, watch=watch).stats.reverse_kl_N.mean() for _ in range(3))
    assert third < second < first


def test_a_loss_that_is_no_number_stops_before_the_weights_change(make_model, make_rollout):
    learner = Learner(make_model, make_rollout, engine=TorchEngine)
    before = learner.weights()
    with torch.no_grad():
        learner.teacher.head_for(empty()).weight_VD[7] = math.nan
    with pytest.raises(RunStopped, match="the loss is nan nats"):
        learner.run()
    assert all(torch.equal(weight, before[name]) for name, weight in learner.weights().items())


def test_a_selector_that_keeps_another_count_than_it_announced_is_stopped(learner):
    class Liar:
        needs = needs_kept = frozenset()
        normalise_over, fixed_budget = "micro_batch", True

        def budget(self, tokens):
            return 1

        def __call__(self, stats, seed=0):
            return Selection(torch.ones_like(stats.rollout_N, dtype=torch.bool))

    with pytest.raises(RunStopped, match=r"kept 35 tokens, its budget\(\) says 6"):
        learner.run(selector=Liar())


def test_rollouts_without_a_token_stop_the_run(learner, make_rollout):
    learner.rollouts = [make_rollout(0, [7, 8], [9, 10], [False, False])]
    with pytest.raises(RunStopped, match="no token to train on"):
        learner.run()


def test_tool_tokens_are_neither_counted_nor_kept(learner, make_rollout):
    # Of six response tokens four are the student's: ⌊4/2⌋ = 2 are kept.
    mask = [True, True, False, False, True, True]
    learner.rollouts = [make_rollout(0, [7, 8], [9, 10, 11, 12, 13, 14], mask)]
    result = learner.run("entropy", watch=frozenset({"entropy_N"}))
    assert (result.kept, result.tokens) == (2, 4)
    assert result.stats.token_ids_N.tolist() == [9, 10, 13, 14]


@pytest.mark.numeric
@pytest.mark.parametrize(("by", "options"), SELECTORS)
def test_a_rollouts_weight_multiplies_its_loss_and_not_the_count(learner, by, options):
    whole = learner.run(by, **options, watch=frozenset({"reverse_kl_N"}))
    expected = whole.stats.reverse_kl_N * torch.tensor([0.0, 2.0, 1.0, 0.5, 1.0, 1.5])[whole.stats.rollout_N]
    weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 1.0, 1.5])
    weighted = learner.run(by, **options, max_tokens=16, weights=weights)
    assert weighted.kept == whole.kept
    close(weighted.loss_nats, expected[whole.kept_N].sum() / whole.kept, *LOSS)
