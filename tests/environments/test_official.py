"""Against the benchmark's own code, where a user's copy is at hand (DEEPPLANNING_ROOT): scores and tools agree."""

import copy
import json
import sys
import types
from random import Random

import pytest
from trips import plan_text, without, write_tables

from opsd.environments.travel import TravelEnv, generate_tasks, load_tasks
from opsd.environments.travel.official import load_module
from opsd.environments.travel.oracle import oracle_plan
from opsd.environments.travel.task import DEEPPLANNING, FILES, TravelTask
from opsd.environments.travel.tools import PARAMETERS


def written_plan(task, rng):
    """A plan in the grammar that names each gold with chance 2/3, among other names and random prices."""
    keep = lambda: rng.random() < 2 / 3  # noqa: E731
    golds = task.constraints.values()
    trips = [
        (kind, gold[f"{way}_{kind}_no"])
        for gold in golds
        for way in ("outbound", "inbound")
        for kind in ("flight", "train")
        if f"{way}_{kind}_no" in gold
    ]
    lines = [
        f"07:00-09:00 | travel_intercity_public | {kind} {number}, A - B, ¥{rng.randrange(900)}/person"
        for kind, number in trips
        if keep()
    ]
    names = [("meal", f"Lunch, {gold['restaurant_name']}") for gold in golds if "restaurant_name" in gold]
    names += [("attraction", name) for gold in golds for name in gold.get("attraction_names", [])]
    lines += [f"10:00-11:00 | {kind} | {name}, ¥{rng.randrange(300)}/person" for kind, name in names if keep()]
    lines += [f"12:00-12:20 | travel_city | A - B, 3km, 20min, ¥{rng.randrange(60)}"] * rng.randrange(3)
    hotels = [gold["hotel_name"] for gold in golds if "hotel_name" in gold and keep()]
    days = [[] for _ in range(task.meta["days"])]
    for line in lines:
        rng.choice(days).append(line)
    stay = lambda: f"{rng.choice([*hotels, 'Some Inn'])}, ¥{rng.randrange(100, 700)}/room/night" if keep() else "-"  # noqa: E731
    heads = [f"Day {number}:\nCurrent City: X\nAccommodation: {stay()}" for number in range(1, len(days) + 1)]
    return "\n".join(
        ["<plan>", *(line for head, day in zip(heads, days, strict=True) for line in (head, *day)), "</plan>"]
    )


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_hard_scores_equal_the_benchmarks_on_its_public_queries(official, queries, env, lang):
    rng, verdicts = Random(0), []
    for task in load_tasks(queries, lang):
        for _ in range(5):
            text = written_plan(task, rng)
            ours = env.score(text, task).hard
            plan = env.parse(text, task)
            assert plan is not None and ours == official.hard(plan, copy.deepcopy(task.meta))
            verdicts += ours.values()
    assert len(verdicts) == 5 * {"en": 496, "zh": 497}[lang] and 0.3 < sum(verdicts) / len(verdicts) < 0.9


def test_every_gold_name_survives_the_grammar(official, queries, env):
    always = Random(0)
    always.random = lambda: 0.0
    for lang in ("en", "zh"):
        for task in load_tasks(queries, lang):
            score = env.score(written_plan(task, always), task)
            assert {k for k, held in score.hard.items() if not held} <= {"budget_constraint"} | {
                k for k in task.constraints if k.startswith("hotel_")
            }


@pytest.mark.parametrize("compact", [True, False])
def test_the_benchmarks_rules_find_no_fault_with_the_oracle(official, tmp_path, compact):
    for task in generate_tasks(10, seed=2, compact=compact):
        write_tables(task.tables, tmp_path / task.id)
        theirs = TravelTask(task.id, "en", task.query, task.meta, db_dir=tmp_path / task.id, source=DEEPPLANNING)
        env = TravelEnv(official._folder)
        score = env.score(plan_text(oracle_plan(task)), theirs)
        assert (score.commonsense, score.composite, score.case_acc) == (1.0, 1.0, 1.0)
        key = next(iter(task.constraints))
        assert env.score(plan_text(without(oracle_plan(task), task, key)), theirs).hard_all is False


def test_plans_that_its_rules_were_not_written_for_still_get_a_score(official, tmp_path):
    (task,) = generate_tasks(1, seed=2)
    write_tables(task.tables, tmp_path)
    theirs = TravelTask(task.id, "en", task.query, task.meta, db_dir=tmp_path, source=DEEPPLANNING)
    for text in (
        "<plan></plan>",
        "<plan>Day 1:\n99:99-00:00 | travel_city | x</plan>",
        "<plan>Day 1:\n</plan>",
        "none",
    ):
        assert TravelEnv(official._folder).score(text, theirs).commonsense in (None, *(n / 8 for n in range(9)))


def test_its_prompt_and_schemas_are_used_for_its_tasks_alone(official, env):
    (task,) = generate_tasks(1, seed=2)
    theirs = TravelTask("0", "en", "q", task.meta, given=task.tables, source=DEEPPLANNING)
    env = TravelEnv(official._folder)
    assert len(env.reset(theirs)[0]["content"]) > 10_000 > len(env.reset(task)[0]["content"])
    assert {tool["function"]["name"] for tool in env.tool_schemas(theirs)} == set(PARAMETERS)


@pytest.fixture
def tools_of(official, monkeypatch):
    """The benchmark's own tools on a database folder; the framework that they register with is stood in for."""
    base = types.ModuleType("qwen_agent.tools.base")

    class BaseTool:
        description, parameters, name = "", [], ""

        def __init__(self, cfg=None):
            self.cfg = cfg

        def _verify_json_format_args(self, params):
            return json.loads(params) if isinstance(params, str) else params

    registry = {}
    base.BaseTool, base.TOOL_REGISTRY = BaseTool, registry
    base.register_tool = lambda name: lambda cls: registry.setdefault(name, cls)
    for name in ("qwen_agent", "qwen_agent.tools"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "qwen_agent.tools.base", base)
    files = {part: f"{part}s" for part in ("train", "flight", "hotel", "attraction", "restaurant", "location")}
    files["roadroute"] = "routes"
    # Registering happens on import: another language's test may have imported them already.
    load_module.cache_clear()
    for name in [name for name in sys.modules if name.startswith("opsd_user_copy_")]:
        monkeypatch.delitem(sys.modules, name)
    tables = {}
    for part, table in files.items():
        before = set(registry)
        name = f"{part}_search_tool" if part == "location" else f"{part}_query_tool"
        load_module(official._folder / "tools", name)
        tables |= dict.fromkeys(set(registry) - before, table)

    def make(folder, lang):
        return {
            name: registry[name]({"database_path": str(folder / FILES[table]), "language": lang})
            for name, table in tables.items()
        }

    return make


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_tool_answers_word_for_word(tools_of, env, tmp_path, lang):
    (made,) = generate_tasks(1, seed=4, compact=False)
    write_tables(made.tables, tmp_path)
    theirs, task = tools_of(tmp_path, lang), TravelTask("0", lang, "", made.meta, db_dir=tmp_path)
    meta, tables = made.meta, made.tables
    out = {"origin": meta["org"], "destination": meta["dest"][0], "depDate": meta["depart_date"]}
    nights = {"destination": "x", "checkinDate": "x", "checkoutDate": "x"}
    attraction, restaurant, road = tables["attractions"][0], tables["restaurants"][0], tables["routes"][0]
    calls = {
        "query_train_info": out,
        "query_flight_info": {**out, "seatClassName": "Economy Class"},
        "query_hotel_info": {**nights, "hotelStar": tables["hotels"][0]["hotel_star"]},
        "query_attraction_details": {"attraction_name": attraction["attraction_name"]},
        "recommend_attractions": {"city": "x", "attraction_type": attraction["attraction_type"]},
        "search_location": {"place_name": attraction["attraction_name"]},
        "query_road_route_info": {"origin": road["origin"], "destination": road["destination"]},
        "recommend_restaurants": {"latitude": attraction["latitude"], "longitude": attraction["longitude"]},
        "query_restaurant_details": {"restaurant_name": restaurant["restaurant_name"]},
    }
    assert set(calls) == set(PARAMETERS) == set(theirs)
    for name, arguments in calls.items():
        assert env.call(name, arguments, task) == theirs[name].call(arguments), name
