"""Rock tokens: by hand, against plain loops, over ranks, and over a checkpoint."""

import json
from collections import defaultdict

import pytest
import torch

from opsd.utils.errors import UserError
from tip_patch.rock_tokens import RockBypass, rocks

F64 = torch.float64


def alone(counts):
    return counts


def test_rocks_by_hand():
    # Σδ 30 over 10 tokens, mean 3: ids 1 (mean 5) and 3 (mean 8) are above it, 0 and 2 are not, 4 was never written
    tokens_V = torch.tensor([5.0, 2.0, 1.0, 2.0, 0.0], dtype=F64)
    nats_V = torch.tensor([2.0, 10.0, 2.0, 16.0, 0.0], dtype=F64)
    assert rocks(tokens_V, nats_V, 100, 1.0).tolist() == [3, 1]
    assert rocks(tokens_V, nats_V, 1, 1.0).tolist() == [3]
    # id 3 holds 2 of 10 tokens, both together 4
    assert rocks(tokens_V, nats_V, 100, 0.3).tolist() == [3]
    assert rocks(tokens_V, nats_V, 100, 0.1).tolist() == []


def test_where_all_losses_are_alike_nothing_is_a_rock():
    assert rocks(torch.ones(4, dtype=F64), torch.full((4,), 2.0, dtype=F64), 100, 1.0).tolist() == []


def test_no_token_is_left_out_before_after_steps_and_rocks_are_afterwards(make_stats):
    selector = RockBypass(after_steps=2, most_of_tokens=0.5)
    stats = make_stats(rollout=[0, 0, 1, 1], ids=[7, 2, 7, 3], delta=[9.0, 1.0, 9.0, 1.0], vocab=8)
    for _ in range(2):
        assert selector(stats).kept_N.all()
        selector.end_step(alone)
    assert selector(stats).kept_N.tolist() == [False, True, False, True]
    assert not selector.fixed_budget


def test_within_a_step_nothing_changes(make_stats):
    selector = RockBypass(after_steps=1, most_of_tokens=1.0)
    stats = make_stats(ids=[7, 2], delta=[9.0, 1.0], vocab=8)
    assert selector(stats).kept_N.all() and selector(stats).kept_N.all()


def test_a_token_that_is_learnt_drops_out(make_stats):
    selector = RockBypass(after_steps=1, most_of_tokens=0.5, decay=0.5)
    for delta in (9.0, 0.0, 0.0, 0.0, 0.0):
        selector(make_stats(ids=[7, 2], delta=[delta, 1.0], vocab=8))
        selector.end_step(alone)
    # id 7: Σδ 9/16; id 2: nearly 2
    assert selector(make_stats(ids=[7, 2], delta=[0.0, 1.0], vocab=8)).kept_N.tolist() == [True, False]


def test_of_what_is_left_the_budget_is_kept_and_never_a_rock(random_stats):
    selector = RockBypass(retention=0.3, after_steps=1)
    stats = random_stats(400, 5, seed=1)
    selector(stats, seed=2)
    selector.end_step(alone)
    rock_ids = naive_rocks([stats], selector)
    kept_N = selector(stats, seed=3).kept_N
    assert rock_ids and not rock_ids & set(stats.token_ids_N[kept_N].tolist())
    for one in stats.rollout_N.unique():
        rows_N = stats.rollout_N == one
        assert int(kept_N[rows_N].sum()) == selector.budget(int(rows_N.sum()))


def naive_rocks(steps, selector):
    """The rule once more, a token at a time."""
    tokens, nats = defaultdict(float), defaultdict(float)
    for age, stats in enumerate(reversed(steps)):
        for number, delta in zip(stats.token_ids_N.tolist(), stats.reverse_kl_N.tolist(), strict=True):
            tokens[number] += selector.decay**age
            nats[number] += selector.decay**age * delta
    mean = sum(nats.values()) / sum(tokens.values())
    found, held = [], 0.0
    for number in sorted(nats, key=lambda one: -nats[one]):
        if nats[number] / tokens[number] <= mean:
            continue
        held += tokens[number]
        if held > selector.most_of_tokens * sum(tokens.values()):
            break
        found.append(number)
    return set(found[: selector.most])


def test_after_several_steps_the_rocks_are_the_naive_ones(random_stats):
    selector = RockBypass(after_steps=3, most=5)
    steps = [random_stats(300, 4, seed) for seed in range(4)]
    for stats in steps:
        selector(stats)
        selector.end_step(alone)
    probe = random_stats(600, 4, seed=9)
    left_out = set(probe.token_ids_N[~selector(probe).kept_N].tolist())
    assert left_out == naive_rocks(steps, selector) & set(probe.token_ids_N.tolist())


def test_ranks_learn_the_same_as_one_process(random_stats):
    whole, ranks = RockBypass(after_steps=1), [RockBypass(after_steps=1) for _ in range(2)]
    stats = random_stats(300, 4, seed=0)
    parts = [random_stats(0, 4, seed=0)]
    halves = [stats.token_ids_N[:100], stats.token_ids_N[100:]], [stats.reverse_kl_N[:100], stats.reverse_kl_N[100:]]
    for rank, ids_N, delta_N in zip(ranks, *halves, strict=True):
        rank._see(ids_N, delta_N, 64)
    whole(stats)
    # an empty micro-batch adds nothing
    ranks[0](parts[0])
    total = sum(rank._seen_2V for rank in ranks)
    whole.end_step(alone)
    for rank in ranks:
        rank.end_step(lambda _: total)
    # The order of a sum may differ in the last digit.
    assert [rank._rocks_K.tolist() for rank in ranks] == [whole._rocks_K.tolist()] * 2


def test_state_over_json_goes_on_bit_for_bit(random_stats):
    selector, resumed = RockBypass(after_steps=2), RockBypass(after_steps=2)
    for seed in range(3):
        selector(random_stats(200, 3, seed))
        selector.end_step(alone)
    resumed.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    for seed in range(3, 6):
        masks = [one(random_stats(200, 3, seed), seed).kept_N for one in (selector, resumed)]
        assert torch.equal(*masks) and not masks[0].all()
        for one in (selector, resumed):
            one.end_step(alone)
    assert resumed.state_dict() == selector.state_dict()


def test_a_step_that_is_left_out_is_forgotten(random_stats):
    selector, other = RockBypass(after_steps=1), RockBypass(after_steps=1)
    selector(random_stats(200, 3, seed=8))
    selector.load_state_dict(selector.state_dict())  # as the trainer does where a step cannot be trained on
    for one in (selector, other):
        one(random_stats(200, 3, seed=1))
        one.end_step(alone)
    assert selector.state_dict() == other.state_dict()


def test_without_a_vocabulary_size_it_says_so(make_stats):
    with pytest.raises(UserError, match="vocab_size"):
        RockBypass()(make_stats(ids=[1], delta=[0.1]))
