"""The plan parser: every form of line, the last block, and that nothing a model writes raises or takes long."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trips import plan_text

from opsd.environments.travel import TravelEnv, generate_tasks
from opsd.environments.travel.oracle import oracle_plan
from opsd.environments.travel.plan import MAX_CHARACTERS, parse_plan, plan_block, split_price

HEAD = "Day 1:\nCurrent City: from A to B\n"


def activity(line):
    (found,) = parse_plan(HEAD + line).daily_plans[0]["activities"]
    return found


def test_each_kind_of_line_gives_its_fields():
    assert activity(
        "07:00-09:00 | travel_intercity_public | flight CA1234, North Airport - South Airport, ¥650/person"
    ) == {
        "time_slot": "07:00-09:00",
        "type": "travel_intercity_public",
        "details": {
            "mode": "flight",
            "number": "CA1234",
            "from": "North Airport",
            "to": "South Airport",
            "cost": 650.0,
        },
    }
    assert activity("09:40-10:40 | travel_city | Airport - Hotel, 30km, 60min, ¥30")["details"] == {
        "from": "Airport",
        "to": "Hotel",
        "distance": "30km",
        "duration": "60min",
        "cost": 30.0,
    }
    assert activity("12:50-17:00 | attraction | The Museum, ¥60/person")["details"] == {
        "name": "The Museum",
        "cost": 60.0,
    }
    assert activity("11:40-12:40 | meal | Lunch, Duck House, ¥150/person")["details"] == {
        "meal_type": "Lunch",
        "name": "Duck House",
        "cost": 150.0,
    }
    assert activity("10:40-11:30 | hotel | Check-in, Grand Hotel")["details"] == {
        "activity": "Check-in",
        "name": "Grand Hotel",
    }
    assert activity("09:00-09:40 | buffer | Baggage claim, a walk")["details"] == {
        "description": "Baggage claim, a walk"
    }


def test_chinese_punctuation_reads_like_latin():
    assert (
        activity("11:40-12:40 ｜ meal | 午餐，四季民福烤鸭店（王府井店），￥150/人")["details"]["name"]
        == "四季民福烤鸭店（王府井店）"
    )
    assert (
        activity("07:00-09:00 | travel_intercity_public | 高铁 G1，北京南 - 上海虹桥，￥550/人")["details"]["mode"]
        == "train"
    )


@pytest.mark.parametrize(
    ("text", "name", "price"),
    [
        (
            "China Knife, Scissors, and Sword Museum, ¥1,200.50/person",
            "China Knife, Scissors, and Sword Museum",
            1200.5,
        ),
        ("Park, Free", "Park", 0.0),
        ("Park, 30 RMB", "Park", 30.0),
        ("Park", "Park", None),
        ("Park, ¥many", "Park, ¥many", None),
        ("Room 5, East", "Room 5, East", None),
    ],
)
def test_a_price_is_split_off_and_commas_of_the_name_stay(text, name, price):
    assert split_price(text) == (name, price)


def test_accommodation_of_the_last_day_is_a_dash():
    plan = parse_plan("Day 1:\nAccommodation: Inn - East, Branch 2, ¥300/room/night\nDay 2:\nAccommodation: -\n")
    assert plan.daily_plans[0]["accommodation"] == {"name": "Inn - East, Branch 2", "price_per_night": 300.0}
    assert "accommodation" not in plan.daily_plans[1]


def test_the_last_closed_block_behind_the_last_thought_counts():
    assert plan_block("<plan>1</plan> <plan>2</plan>") == "2"
    assert plan_block("<plan>draft</plan></think><plan>final</plan>") == "final"
    assert plan_block("<plan>draft</plan></think>no plan") is None
    assert plan_block("<plan>1</plan> <plan>cut off") == "1"
    assert plan_block("<plan>a<plan>b</plan>") == "b"
    assert plan_block("</plan><plan>") is None
    assert plan_block(f"<plan>{'x' * MAX_CHARACTERS}</plan>") is None


def test_the_summary_is_no_activity_and_bold_marks_do_not_matter():
    summary = "**Budget Summary**:\n  **Meals: 5 RMB**. 09:00\n**Total Estimated Budget: 6,280 RMB**"
    plan = parse_plan("**Day 1:**\n- 09:00-10:00 | buffer | x\n" + summary)
    assert len(plan.daily_plans[0]["activities"]) == 1 and plan.unread == [] and plan.total_budget == 6280.0


def test_lines_that_fit_nothing_are_named():
    plan = parse_plan(HEAD + "09:00-10:00 | teleport | moon\nhello")
    assert plan.unread == ["09:00-10:00 | teleport | moon", "hello"]


@pytest.mark.parametrize("compact", [True, False])
def test_a_written_plan_reads_back_as_it_was(compact):
    for task in generate_tasks(8, seed=11, compact=compact):
        plan = oracle_plan(task)
        read = parse_plan(plan_block(plan_text(plan)) or "")
        assert (read.daily_plans, read.total_budget, read.unread) == (plan.daily_plans, plan.total_budget, [])


TASK = generate_tasks(1, seed=5)[0]
ORACLE = plan_text(oracle_plan(TASK))
PIECES = [
    *("<plan>", "</plan>", "</think>", "Day 1:", "Day 99999:", "Day ²:", "Accommodation: ", "Current City:", " | "),
    *("¥", "¥9e9", ",", "99:99-00:00 | meal | ", "24:00-25:00 | travel_city | - - -", "travel_intercity_public", "\n"),
    *("**Budget Summary**", "１２"),
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=40).map("".join))
def test_no_text_raises(text):
    for answer in (text, f"<plan>{text}</plan>", f"<plan>Day 1:\n{text}</plan>"):
        score = TravelEnv().score(answer, TASK)
        assert 0.0 <= score.hard_fraction <= 1.0 and set(score.hard) == set(TASK.constraints)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, len(ORACLE)), st.integers(0, 60), st.text(max_size=6))
def test_a_plan_with_a_hole_never_raises_and_never_gains(place, length, filling):
    score = TravelEnv().score(ORACLE[:place] + filling + ORACLE[place + length :], TASK)
    assert score.hard_fraction <= 1.0


def test_time_is_bounded_on_hostile_text():
    hostile = [
        "<plan>" * 30_000,
        "<plan>Day 1:\n" + "09:00-10:00 | meal | " + "," * 150_000 + "</plan>",
        "<plan>" + "Day 1:\n" * 25_000 + "</plan>",
        "¥" * 190_000,
        "<plan>Day 1:\n" + "1" * 190_000 + "</plan>",
    ]
    start = time.process_time()
    for text in hostile:
        TravelEnv().score(text, TASK)
    # Linear work on a million characters; quadratic work would take minutes.
    assert time.process_time() - start < 10.0
