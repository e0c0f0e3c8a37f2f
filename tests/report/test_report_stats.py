"""The report's numbers against hand arithmetic on four problems."""

import pytest

from opsd.utils.errors import UserError
from reporting.runs import CellName, by_protocol, read_runs
from reporting.stats import BASELINE, cell_costs, cell_stats, reference, suite_names

SOFT_OR = CellName("soft_or", 0.5)
ALL_0 = {"a": 0.5, "b": 0.5, "c": 0.75, "d": 0.25}
SOFT_0 = {"a": 0.75, "b": 0.5, "c": 1.0, "d": 0.25}
ALL_1 = {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.5}
SOFT_1 = {"a": 0.5, "b": 0.5, "c": 0.75, "d": 0.25}


def stats_of(folder, cells=(BASELINE, SOFT_OR)):
    (group,) = by_protocol(read_runs(folder))
    return cell_stats(group, list(cells), "pocket")


def test_accuracy_is_the_mean_over_problems_with_its_standard_error(make_run):
    (row,) = stats_of(make_run("all", 1.0, ALL_0), [BASELINE])
    # mean (0.5 + 0.5 + 0.75 + 0.25)/4 = 0.5; deviations 0, 0, ±0.25: √(0.125/3)/√4 = 0.102062
    assert row.accuracy.mean == 0.5
    assert row.accuracy.stderr_problems == pytest.approx(0.102062, abs=1e-6)
    assert row.accuracy.stderr_seeds is None


def test_the_difference_to_all_is_paired_by_problem(make_run):
    make_run("all", 1.0, ALL_0)
    _, row = stats_of(make_run("soft_or", 0.5, SOFT_0))
    # differences 0.25, 0, 0.25, 0: mean 0.125, deviations ±0.125: √(4·0.015625/3)/√4 = 0.072169.
    # Unpaired it would be √(0.102062² + 0.161374²) = 0.19.
    assert row.minus_all.mean == 0.125
    assert row.minus_all.stderr_problems == pytest.approx(0.072169, abs=1e-6)


def test_several_seeds_give_an_error_over_problems_and_one_over_seeds(make_run):
    make_run("all", 1.0, ALL_0), make_run("all", 1.0, ALL_1, seed=1)
    make_run("soft_or", 0.5, SOFT_0)
    baseline, row = stats_of(make_run("soft_or", 0.5, SOFT_1, seed=1))
    assert row.seeds == [0, 1]
    # per problem, averaged over seeds: 0.125, 0, 0.25, −0.125: mean 0.0625, √(0.078125/3)/2 = 0.080687
    # per seed: 0.125 and 0: deviation 0.088388, /√2 = 0.0625
    assert row.minus_all.mean == 0.0625
    assert row.minus_all.stderr_problems == pytest.approx(0.080687, abs=1e-6)
    assert row.minus_all.stderr_seeds == pytest.approx(0.0625)
    # `all` is 0.5 under both seeds
    assert baseline.accuracy.stderr_seeds == 0.0


def test_a_difference_uses_only_the_seeds_that_both_cells_have(make_run):
    make_run("all", 1.0, ALL_0)
    make_run("soft_or", 0.5, SOFT_0)
    _, row = stats_of(make_run("soft_or", 0.5, SOFT_1, seed=1))
    assert row.seeds == [0, 1]
    assert row.minus_all.mean == 0.125  # seed 0 alone, as above


def test_an_unfinished_run_does_not_count(make_run):
    make_run("all", 1.0, ALL_0)
    _, row = stats_of(make_run("soft_or", 0.5, SOFT_0, done=False))
    assert row.accuracy is None and row.minus_all is None and row.seeds == []


def test_start_and_teacher_are_read_from_their_own_evaluations(make_run):
    (group,) = by_protocol(read_runs(make_run("all", 1.0, ALL_0)))
    assert suite_names(group) == ["pocket"]
    assert reference(group, "step_0", "pocket").mean == 0.25
    assert reference(group, "teacher", "pocket").mean == 1.0
    assert reference(group, "elsewhere", "pocket") is None


def test_costs_are_means_of_logged_steps_the_peak_and_the_median_step(make_run):
    quadrants = {"quadrant/q1_frac": 0.2, "quadrant/q2_frac": 0.3, "quadrant/q3_frac": 0.1, "quadrant/q4_frac": 0.4}
    metrics = (
        {"step": 0, "eval/pocket/mean@16": 0.25},
        {"step": 1, "select/kept_frac": 0.5, "mem/peak_gib": 1.0, "time/step_s": 9.0},
        {"step": 2, "select/kept_frac": 0.48, "mem/peak_gib": 1.5, "time/step_s": 1.0, **quadrants},
        {"step": 3, "select/kept_frac": 0.46, "mem/peak_gib": 1.5, "time/step_s": 2.0, **quadrants},
    )
    (group,) = by_protocol(read_runs(make_run("soft_or", 0.5, SOFT_0, metrics=metrics)))
    baseline, cost = cell_costs(group, [BASELINE, SOFT_OR])
    # kept (0.5 + 0.48 + 0.46)/3 = 0.48; quadrants over the two steps that have them; median of 9, 1, 2 is 2
    assert cost.kept_frac == pytest.approx(0.48)
    assert cost.quadrants == pytest.approx((0.2, 0.3, 0.1, 0.4))
    assert (cost.peak_gib, cost.step_s) == (1.5, 2.0)
    assert (baseline.kept_frac, baseline.quadrants, baseline.peak_gib, baseline.step_s) == (None,) * 4


def test_runs_of_another_protocol_are_never_averaged_together(make_run):
    make_run("all", 1.0, ALL_0)
    groups = by_protocol(read_runs(make_run("all", 1.0, ALL_1, steps=7)))
    assert [[run.config["steps"] for run in group] for group in groups] == [[2], [7]]


def test_the_same_cell_and_seed_twice_is_an_error(make_run):
    make_run("all", 1.0, ALL_0)
    folder = make_run("all", 0.5, ALL_0, name="again")  # `all` keeps every token, whatever its retention says
    with pytest.raises(UserError, match="same cell and seed"):
        by_protocol(read_runs(folder))


def test_other_evaluation_problems_are_an_error(make_run):
    make_run("all", 1.0, ALL_0)
    with pytest.raises(UserError, match="different problems of pocket"):
        stats_of(make_run("soft_or", 0.5, {"x": 1.0, "y": 0.0}))
