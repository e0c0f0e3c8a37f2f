"""The score: the oracle's plan is perfect, a broken constraint costs exactly its share, validity stands beside."""

from random import Random

import pytest
from trips import golds, plan_text, without

from opsd.environments.travel import PlanScore, load_tasks
from opsd.environments.travel.oracle import oracle_plan
from opsd.environments.travel.plan import Plan
from opsd.environments.travel.score import plan_cost, score_plan
from opsd.environments.travel.words import SECTIONS, vocabulary


def meal(name, cost):
    return {"time_slot": "11:00-12:00", "type": "meal", "details": {"meal_type": "Lunch", "name": name, "cost": cost}}


def test_the_oracle_satisfies_everything(env, full_tasks, compact_tasks):
    for task in [*full_tasks, *compact_tasks]:
        score = env.score(plan_text(oracle_plan(task)), task)
        assert (score.hard_fraction, score.hard_all, score.delivered, score.valid) == (1.0, True, True, True)
        assert len(score.hard) in (4, 5)


def test_one_broken_constraint_costs_exactly_its_share(env, full_tasks, compact_tasks):
    broken = set()
    for task in [*full_tasks, *compact_tasks]:
        count = len(task.constraints)
        for key in task.constraints:
            score = env.score(plan_text(without(oracle_plan(task), task, key)), task)
            assert score.hard == {other: other != key for other in task.constraints}
            assert score.hard_fraction == (count - 1) / count and not score.hard_all and score.valid
            broken.add(key.split("_")[0])
    assert broken == {"train", "flight", "hotel", "restaurant", "attraction", "budget"}


def test_the_word_form_scores_alike(env, word_tasks):
    for task in word_tasks:
        right = golds(task)
        write = lambda chosen: f"<plan> {' '.join(f'{s} {w}' for s, w in chosen.items())} </plan>"  # noqa: E731
        assert env.score(write(right), task).hard_fraction == 1.0 and env.score(write(right), task).valid
        for section in SECTIONS:
            assert env.score(write({**right, section: "none"}), task).hard_fraction == 2 / 3
            rest = {s: w for s, w in right.items() if s != section}
            assert env.score(write(rest), task).hard_fraction == 2 / 3 and not env.score(write(rest), task).valid


def test_a_random_agent_scores_near_nothing(env, word_tasks):
    rng, words = Random(0), vocabulary()
    scores = [env.score(" ".join(rng.choice(words) for _ in range(72)), task).hard_fraction for task in word_tasks * 25]
    assert sum(scores) / len(scores) < 0.01
    # A closed plan of random words: three sections, each filled by one word of 127.
    plans = [f"<plan> {' '.join(f'{s} {rng.choice(words)}' for s in SECTIONS)} </plan>" for _ in range(1000)]
    scores = [env.score(plan, task).hard_fraction for plan, task in zip(plans, word_tasks * 25, strict=True)]
    assert 0.0 < sum(scores) / len(scores) < 0.05


def test_no_plan_fails_every_constraint_and_says_why(env, compact_tasks):
    score = env.score("I could not plan this.", compact_tasks[0])
    assert (score.hard_fraction, score.delivered, score.valid, score.cost) == (0.0, False, False, None)
    assert score.problems == ["no closed <plan> block"] and set(score.hard) == set(compact_tasks[0].constraints)


def test_an_empty_day_keeps_the_budget_but_is_no_valid_plan():
    # The benchmark's free floor: nothing bought is within any budget. Validity stands beside the score for this.
    meta = {
        "days": 1,
        "hard_constraints": {"budget_constraint": {"max_budget": 1}, "hotel_cheapest_star": {"hotel_name": "H"}},
    }
    score = score_plan(Plan([{"day_number": 1, "current_city": "", "activities": []}]), meta)
    assert score.hard == {"budget_constraint": True, "hotel_cheapest_star": False}
    assert not score.valid and score.problems == ["day 1 has no activity"]
    assert not any(score_plan(Plan([]), meta).hard.values())


def test_cost_counts_people_rooms_and_cars():
    def trip(cost):
        return {
            "time_slot": "",
            "type": "travel_intercity_public",
            "details": {"mode": "train", "number": "G1", "cost": cost},
        }

    ride = {"time_slot": "", "type": "travel_city", "details": {"from": "", "to": "", "cost": 10.0}}
    days = [
        {
            "day_number": 1,
            "accommodation": {"name": "H", "price_per_night": 200.0},
            "activities": [trip(100.0), trip(100.0), ride, meal("R", 30.0)],
        },
        {"day_number": 2, "accommodation": {"name": "H", "price_per_night": 200.0}, "activities": [trip(50.0)]},
    ]
    # Five people, three rooms, two cars: trains 5·100 (a transfer once) and 5·50, meal 5·30, rides 2·10, night 3·200.
    assert plan_cost(days, {"people_number": 5, "room_number": 3}) == 500 + 250 + 150 + 20 + 600


@pytest.mark.parametrize(
    ("gold", "held"),
    [
        ({"train_x": {"outbound_train_no": "G1", "inbound_train_no": "G2"}}, True),
        ({"train_x": {"outbound_train_no": "G1", "inbound_train_no": "G3"}}, False),
        ({"flight_x": {"outbound_flight_no": "G1"}}, False),  # a train of that number is no flight
        ({"restaurant_x": {"restaurant_name": "R"}}, True),
        ({"restaurant_x": {}}, False),
        ({"attraction_x": {"attraction_names": []}}, False),
        ({"attraction_x": {"attraction_names": ["R"]}}, False),  # a restaurant is no attraction
        ({"weather_x": {}}, False),
        ({"budget_constraint": {"max_budget": "nonsense"}}, False),
        ({"budget_constraint": {"max_budget": 10**400}}, False),  # more than a float holds
    ],
)
def test_a_constraint_holds_where_its_names_stand_in_lines_of_its_kind(gold, held):
    def ride(no):
        details = {"mode": "train", "number": no}
        return {"time_slot": "00:00-01:00", "type": "travel_intercity_public", "details": details}

    plan = Plan([{"day_number": 1, "activities": [ride("G1"), ride("G2"), meal("R", 1.0)]}])
    assert list(score_plan(plan, {"days": 1, "hard_constraints": gold}).hard.values()) == [held]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace("Day 2:", "Day 3:"), "days [1, 3]"),
        (lambda text: text.replace("Accommodation: ", "Stay: ", 1), "a line fits no form: Stay"),
        (lambda text: text.replace("23:00", "03:00", 1), "day 1 has times that overlap"),
    ],
)
def test_a_plan_of_the_wrong_shape_keeps_its_score_and_says_what_is_wrong(env, compact_tasks, change, problem):
    task = next(task for task in compact_tasks if not any("budget" in key for key in task.constraints))
    score = env.score(change(plan_text(oracle_plan(task))), task)
    assert not score.valid and any(line.startswith(problem) for line in score.problems)


def test_composite_and_case_accuracy_need_the_commonsense_score():
    assert PlanScore({"a": True}, True, True).composite is None
    perfect = PlanScore({"a": True}, True, True, commonsense=1.0)
    partly = PlanScore({"a": True, "b": False}, True, True, commonsense=0.5)
    assert (perfect.composite, perfect.case_acc, partly.composite, partly.case_acc) == (1.0, 1.0, 0.25, 0.0)


def test_the_public_tasks_load_with_all_their_constraints(queries, env):
    en, zh = load_tasks(queries, "en"), load_tasks(queries, "zh")
    assert (len(en), len(zh)) == (120, 120)
    assert (sum(len(task.constraints) for task in en), sum(len(task.constraints) for task in zh)) == (496, 497)
    assert all(env.score("", task).hard_fraction == 0.0 for task in [*en, *zh])
