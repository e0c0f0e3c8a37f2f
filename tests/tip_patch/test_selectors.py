"""Masks against the paper's formulas in plain numpy, by hand, and across layouts, chunk sizes and ranks."""

import dataclasses
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.data.packing import pack
from opsd.distill import concatenate_stats, distill_loss
from opsd.selection import REQUIRED_FIELDS, TokenSelector, TokenStats, load_selector, selector_names
from opsd.types import Prompt, Rollout
from opsd.utils.errors import UserError
from tip_patch.selector import Selector

SCORED = ["entropy", "divergence", "soft_or", "soft_or_bottom", "q3", "teachability"]
FIXED = [*SCORED, "entropy_sample", "random", "adaptive_kl", "first_fraction", "position_weighted", "iw_opd"]
SCOPES = ["micro_batch", "rollout", "batch", "running"]


def rows_of(stats: TokenStats, rows_N: torch.Tensor) -> TokenStats:
    fields = {name: value[rows_N] if isinstance(value, torch.Tensor) else value for name, value in vars(stats).items()}
    return TokenStats(**fields)


def select(name: str, stats: TokenStats, seed: int = 0, **options) -> torch.Tensor:
    selector = load_selector(name, **options)
    selector.prepare(stats)
    return selector(stats, seed).kept_N


class TestAgainstNumpy:
    @pytest.mark.parametrize("scope", ["micro_batch", "rollout", "batch"])
    @pytest.mark.parametrize("name", SCORED)
    def test_random_statistics(self, name, scope, random_stats, naive):
        for seed, retention in ((0, 0.5), (1, 0.2), (2, 0.37)):
            stats = random_stats(400, 7, seed)
            kept_N = select(name, stats, retention=retention, normalise_over=scope)
            score = naive.score(name, stats, scope)
            naive.assert_same_mask(kept_N, score, stats.rollout_N.numpy(), retention)

    @given(
        rows=st.lists(
            st.tuples(st.integers(0, 2), *[st.sampled_from([0.0, 1e-7, 0.3, 0.30001, 2.0, 1e4])] * 3),
            min_size=1,
            max_size=30,
        ),
        retention=st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]),
        name=st.sampled_from(SCORED),
        scope=st.sampled_from(["micro_batch", "rollout", "batch"]),
    )
    @settings(max_examples=150, deadline=None)
    def test_adversarial_statistics(self, rows, retention, name, scope, make_stats, naive):
        rollout, h, delta, forward = zip(*rows, strict=True)
        stats = make_stats(rollout=rollout, h=h, delta=delta, forward=forward)
        kept_N = select(name, stats, retention=retention, normalise_over=scope)
        naive.assert_same_mask(kept_N, naive.score(name, stats, scope), stats.rollout_N.numpy(), retention)

    def test_clips_are_the_options(self, random_stats, naive):
        stats = random_stats(500, 3, seed=5)
        kept_N = select("soft_or", stats, clip_quantile=0.7, divergence_clip_quantile=0.9)
        score = naive.score("soft_or", stats, clip=0.7, delta_clip=0.9)
        naive.assert_same_mask(kept_N, score, stats.rollout_N.numpy(), 0.5)
        assert not torch.equal(kept_N, select("soft_or", stats))

    def test_ranks_replace_min_max(self, random_stats, naive):
        stats = random_stats(300, 3, seed=6)
        h, delta = (
            np.array([(values < value).sum() for value in values]) / 299
            for values in (stats.entropy_N.numpy(), stats.reverse_kl_N.numpy())
        )
        kept_N = select("soft_or", stats, ranks=True)
        naive.assert_same_mask(kept_N, h + delta - h * delta, stats.rollout_N.numpy(), 0.5)

    @pytest.mark.parametrize("name", ["soft_or", "q3"])
    def test_a_huge_outlier_leaves_numbers_finite_and_the_outlier_first(self, name, make_stats):
        stats = make_stats(h=[0.1, 0.2, 0.0, 0.3], delta=[0.1, 0.1, 1e30, 0.1], forward=[0.1, 0.1, 1e30, 0.1])
        assert select(name, stats, retention=0.25).tolist() == [False, False, True, False]


class TestByHand:
    # ĥ = (0, 0.25, 0.5, 1), δ̂ = (0.5, 1, 0.25, 0) without a clip
    H, DELTA, FORWARD = [0.0, 0.5, 1.0, 2.0], [2.0, 4.0, 1.0, 0.0], [3.0, 1.0, 1.5, 9.0]

    @pytest.mark.parametrize(
        ("name", "kept"),
        [
            ("entropy", [2, 3]),
            # Eq. 7: 1 − (1−ĥ)(1−δ̂) = 0.5, 1, 0.625, 1
            ("soft_or", [1, 3]),
            ("soft_or_bottom", [0, 2]),
            # forward KL · (1−ĥ) = 3, 0.75, 0.75, 0; the tie goes to the earlier position
            ("q3", [0, 1]),
            ("divergence", [0, 1]),
            ("first_fraction", [0, 1]),
        ],
    )
    def test_four_tokens(self, name, kept, make_stats):
        stats = make_stats(h=self.H, delta=self.DELTA, forward=self.FORWARD)
        assert select(name, stats, retention=0.5, clip_quantile=1.0).nonzero().flatten().tolist() == kept

    def test_solved_tokens_keep_their_order_beside_a_large_one(self, make_stats):
        # ĥ = 1, 1e-9, 2e-9, 3e-9: 1 − (1−ĥ)(1−δ̂) in fp32 would make the last three a tie
        stats = make_stats(h=[1.0, 1e-9, 2e-9, 3e-9], delta=[0.0] * 4)
        assert select("soft_or", stats, clip_quantile=1.0).tolist() == [True, False, False, True]

    @pytest.mark.parametrize("name", SCORED)
    def test_equal_scores_go_to_the_earlier_positions(self, name, make_stats):
        stats = make_stats(rollout=[5, 2, 5, 2, 5, 2], h=[0.7] * 6, delta=[0.7] * 6, forward=[0.7] * 6)
        # ⌊0.67·3⌋ = 2 of each
        assert select(name, stats, retention=0.67).tolist() == [True, True, True, True, False, False]

    @pytest.mark.parametrize("name", FIXED)
    def test_one_token_is_kept(self, name, make_stats):
        stats = make_stats(h=[0.0], delta=[0.0], forward=[0.0])
        assert select(name, stats, retention=0.01).tolist() == [True]

    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("name", [*FIXED, "verify"])
    def test_no_tokens_is_no_error(self, name, scope, make_stats):
        stats = make_stats(rollout=[], h=[], delta=[], forward=[], rank=[])
        kept_N = select(name, stats, normalise_over=scope)
        assert kept_N.shape == (0,) and kept_N.dtype == torch.bool
        assert load_selector("entropy_sample", importance_weighted=True)(stats).weight_N.shape == (0,)


class TestBudget:
    @pytest.mark.parametrize("name", FIXED)
    @pytest.mark.parametrize("retention", [0.003, 0.1, 0.29, 0.5, 0.57, 1.0])
    def test_known_from_lengths_alone(self, name, retention, random_stats, naive):
        stats = random_stats(230, 9, seed=3)
        selector = load_selector(name, retention=retention)
        kept_N = selector(stats, 1).kept_N
        for one in stats.rollout_N.unique():
            mine = stats.rollout_N == one
            tokens = int(mine.sum())
            assert int(kept_N[mine].sum()) == selector.budget(tokens) == naive.budget(retention, tokens)

    def test_products_that_are_whole_but_for_rounding_count_whole(self):
        # 0.29·100 is 28.999999999999996 in fp64, and 0.57·100 is 56.99999999999999
        assert load_selector("entropy", retention=0.29).budget(100) == 29
        assert load_selector("entropy", retention=0.57).budget(100) == 57
        assert load_selector("entropy", retention=0.5).budget(0) == 0

    @pytest.mark.parametrize(("retention", "kept"), [(0.29, 29), (0.57, 57)])
    def test_so_do_the_tokens_kept(self, retention, kept, make_stats):
        assert int(load_selector("entropy", retention=retention)(make_stats(h=[0.5] * 100)).kept_N.sum()) == kept


class TestSameMaskWhateverTheLayout:
    @pytest.mark.parametrize("name", [*FIXED, "verify"])
    @pytest.mark.parametrize("scope", ["rollout", "batch", "running"])
    def test_micro_batches_their_order_and_interleaving(self, name, scope, random_stats):
        stats = random_stats(240, 8, seed=4)
        whole = load_selector(name, normalise_over=scope)
        if scope == "running":
            whole(random_stats(300, 4, seed=5))
            whole.end_step(lambda counts: counts)
        whole.prepare(stats)
        expected_N = whole(stats, seed=11).kept_N
        for layout in range(3):
            # rollouts dealt over micro-batches in another order each time
            rng = np.random.default_rng(layout)
            owner = dict(zip(stats.rollout_N.unique().tolist(), rng.integers(0, 3, 8).tolist(), strict=True))
            micro_N = torch.tensor([owner[one] for one in stats.rollout_N.tolist()])
            selector = load_selector(name, normalise_over=scope)
            selector.load_state_dict(whole.state_dict())
            # grouped by rollout as a trainer packs them; positions keep their order
            rows = [(micro_N == micro).nonzero().flatten() for micro in rng.permutation(3)]
            rows = [part[stats.rollout_N[part].argsort(stable=True)] for part in rows]
            parts = [rows_of(stats, part) for part in rows]
            selector.prepare(concatenate_stats(parts))
            for part_N, part in zip(rows, parts, strict=True):
                assert torch.equal(selector(part, seed=11).kept_N, expected_N[part_N])

    def test_micro_batch_scope_does_depend_on_the_layout(self, make_stats):
        # alone, ĥ = 1, 0.8, 0 and δ̂ = 0, 2/3, 1: first and last tie at 1. Beside a token of 9 nats ĥ is below 0.06
        # and δ̂ decides.
        h, delta = [0.5, 0.4, 0.0], [0.0, 0.2, 0.3]
        alone = make_stats(h=h, delta=delta)
        together = make_stats(rollout=[0, 0, 0, 1], h=[*h, 9.0], delta=[*delta, 0.3])
        options = {"retention": 0.34, "clip_quantile": 1.0}
        assert select("soft_or", alone, **options).tolist() == [True, False, False]
        assert select("soft_or", together, **options).tolist() == [False, False, True, True]

    @pytest.mark.parametrize("name", ["random", "entropy_sample"])
    def test_seed_and_rollout_id_decide_the_draw_and_nothing_else(self, name, make_stats):
        h = [1.0] * 40
        mine = {seed: select(name, make_stats(rollout=[3] * 40, h=h), seed) for seed in (0, 1)}
        beside = select(name, make_stats(rollout=[9] * 40 + [3] * 40, h=h + h), 0)
        assert torch.equal(mine[0], beside[40:])
        assert not torch.equal(mine[0], mine[1])
        assert not torch.equal(beside[:40], beside[40:])

    @pytest.mark.parametrize("name", FIXED)
    def test_chunk_sizes(self, name):
        generator = torch.Generator().manual_seed(0)
        student_ND, teacher_NE = (torch.randn(40, 8, generator=generator) for _ in range(2))
        student_VD, teacher_VE = (torch.randn(50, 8, generator=generator) for _ in range(2))
        rollout_N = torch.arange(40) % 3
        masks = [
            distill_loss(
                student_ND,
                student_VD,
                teacher_NE,
                teacher_VE,
                rollout_N=rollout_N,
                token_ids_N=torch.arange(40),
                selector=load_selector(name),
                chunk_tokens=chunk,
                seed=5,
            ).kept_N
            for chunk in (1, 7, 40)
        ]
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_the_end_of_sequence_can_be_kept_and_prompt_and_tool_tokens_cannot(make_stats):
    # prompt 10 11, then student 5, tool 6 7, student 8, end of sequence 1: three student tokens, of which ⌊0.34·3⌋ = 1
    rollout = Rollout(0, Prompt("0", "", [10, 11], None), [5, 6, 7, 8, 1], False, [True, False, False, True, True])
    (micro,) = pack([rollout], 100)
    stats = make_stats(rollout=micro.rollout_N, h=[0.1, 0.2, 0.9])
    kept_N = select("entropy", stats, retention=0.34)
    assert micro.token_ids_N.tolist() == [5, 8, 1]
    assert micro.token_ids_N[kept_N].tolist() == [1]


class TestOptions:
    def test_every_name_builds_a_selector_of_the_protocol(self):
        for name in selector_names()[1:]:
            assert isinstance(load_selector(name), TokenSelector)

    def test_first_lines_fit_a_terminal(self):
        from opsd.selection import describe_selectors

        for name, line in describe_selectors().items():
            assert line.endswith(".") and len(line) <= 90, name

    def test_text_from_a_command_line_is_converted(self):
        selector = load_selector("soft_or", retention="0.25", divergence_clip_quantile="0.99", ranks="true")
        assert (selector.retention, selector.divergence_clip_quantile, selector.ranks) == (0.25, 0.99, True)
        assert load_selector("soft_or", ranks="no").ranks is False
        assert load_selector("verify", top_k="3").top_k == 3

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("soft_or", {"retention": "half"}),
            ("soft_or", {"retention": 0.0}),
            ("soft_or", {"retention": 1.01}),
            ("soft_or", {"retention": float("nan")}),
            ("soft_or", {"retention": True}),
            ("soft_or", {"clip_quantile": 0}),
            ("soft_or", {"normalise_over": "epoch"}),
            ("soft_or", {"normalise_over": 3}),
            ("soft_or", {"ranks": "maybe"}),
            ("soft_or", {"divergence_clip_quantile": "2"}),
            ("soft_or", {"running_decay": -0.1}),
            ("soft_or", {"temperature": 1}),
            ("entropy_sample", {"epsilon_nats": "0"}),
            ("adaptive_kl", {"importance_weighted": "true"}),
            ("position_weighted", {"slope": 3}),
            ("verify", {"top_k": 2.5}),
            ("verify", {"top_k": 0}),
            ("iw_opd", {"gamma": -1}),
            ("rock_bypass", {"decay": 0}),
            ("rock_bypass", {"most": 0.5}),
        ],
    )
    def test_a_bad_one_is_one_line_that_names_it(self, name, options):
        with pytest.raises(UserError) as caught:
            load_selector(name, **options)
        message = str(caught.value)
        assert "\n" not in message and next(iter(options)) in message

    def test_a_missing_statistic_is_named(self, make_stats):
        with pytest.raises(UserError, match="soft_or reads reverse_kl_N"):
            load_selector("soft_or")(make_stats(h=[0.1]))

    def test_rules_that_normalise_nothing_ask_for_no_scoring_pass(self):
        asked = {name: load_selector(name, normalise_over="batch").normalise_over for name in FIXED}
        assert {name for name, scope in asked.items() if scope == "batch"} == {
            *("soft_or", "soft_or_bottom", "q3", "teachability")
        }

    def test_selectors_read_only_what_they_name(self, random_stats):
        stats = random_stats(50, 3, seed=0)
        always = {"rollout_N", "vocab_size"}
        for name in selector_names()[1:]:
            selector = load_selector(name)
            bare = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
            bare = {k: v if k in selector.needs | always else None for k, v in bare.items()}
            assert selector(TokenStats(**bare)).kept_N.shape == (50,)


def test_the_rule_in_the_documentation_works_as_shown(make_stats):
    text = (Path(__file__).parents[2] / "docs" / "selectors.md").read_text()
    (code,) = re.findall(r"```python\n(from opsd\.hooks import Selection.*?)```", text, re.DOTALL)
    assert code.count("\n") < 30
    module = types.ModuleType("documented_rule")
    exec(code, module.__dict__)
    sys.modules[module.__name__] = module
    try:
        selector = load_selector("documented_rule:Disagreement", retention="0.5")
    finally:
        del sys.modules[module.__name__]
    assert isinstance(selector, TokenSelector)
    stats = make_stats(rollout=[0, 0, 0, 0, 4], h=[0.1, 0.9, 0.2, 0.3, 0.5])
    stats = dataclasses.replace(stats, top1_agree_N=torch.tensor([True, True, False, True, True]))
    assert selector(stats).kept_N.tolist() == [False, True, True, False, True]


def test_the_documentation_names_every_rule_and_option():
    text = (Path(__file__).parents[2] / "docs" / "selectors.md").read_text()
    for name in selector_names():
        assert f"`{name}`" in text
        if name != "all":
            for option in dataclasses.fields(load_selector(name)):
                assert f"`{option.name}`" in text


@pytest.mark.parametrize(
    ("score", "said"), [("nan", "score is NaN for 1 of 4 tokens"), ("short", r"shape \[3\] for 4")]
)
def test_a_rule_whose_scores_are_no_ranking_is_refused(score, said):
    class Broken(Selector):
        name = "broken"

        def score(self, stats, rollouts, seed):
            return torch.tensor([0.0, torch.nan, 1.0, 2.0]) if score == "nan" else torch.zeros(3)

    with pytest.raises(UserError, match=f"selector broken: .*{said}"):
        Broken()(TokenStats(rollout_N=torch.zeros(4, dtype=torch.int64), **dict.fromkeys(REQUIRED_FIELDS)))
