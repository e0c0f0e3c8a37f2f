"""Tasks on disk and in splits: nothing is lost, twins stay together, every length is held out, damage is named."""

import json
from collections import Counter

import pytest
from trips import golds, write_tables

from opsd.environments.travel import (
    generate_tasks,
    load_tasks,
    pocket_tasks,
    read_task_file,
    split_tasks,
    write_task_file,
)
from opsd.environments.travel.__main__ import main
from opsd.environments.travel.task import FILES, read_tables
from opsd.environments.travel.words import CONSTRAINTS, vocabulary
from opsd.utils.errors import UserError


def test_a_task_file_gives_the_tasks_back(tmp_path, compact_tasks, word_tasks):
    tasks = [*compact_tasks[:3], *word_tasks[:3]]
    write_task_file(tasks, tmp_path / "tasks.jsonl")
    assert read_task_file(tmp_path / "tasks.jsonl") == tasks


def test_tables_survive_their_csv_files(tmp_path, full_tasks):
    write_tables(full_tasks[0].tables, tmp_path)
    assert read_tables(tmp_path) == full_tasks[0].tables
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.csv")) == sorted(FILES.values())


def copy_of_the_benchmark(folder, tasks):
    """A benchmark folder with generated content."""
    (folder / "data").mkdir(parents=True)
    records = [{"id": str(n), "query": t.query, "meta_info": t.meta} for n, t in enumerate(tasks)]
    (folder / "data" / "travelplanning_query_en.json").write_text(json.dumps(records))
    for number, task in enumerate(tasks):
        write_tables(task.tables, folder / "database" / "database_en" / f"id_{number}")


def test_a_copy_of_the_benchmark_loads_from_its_folder_or_its_repository(tmp_path, full_tasks, env):
    folder = tmp_path / "benchmark" / "deepplanning" / "travelplanning"
    copy_of_the_benchmark(folder, full_tasks[:2])
    for root in (folder, folder.parent, tmp_path):
        loaded = load_tasks(root, "en")
        assert [task.id for task in loaded] == ["0", "1"] and {task.source for task in loaded} == {"deepplanning"}
        assert loaded[1].tables == full_tasks[1].tables
        assert env.call("recommend_attractions", {"city": "x"}, loaded[0]).startswith("Recommended")


def test_what_is_missing_is_named(tmp_path, full_tasks, queries):
    with pytest.raises(UserError, match=r"holds no travelplanning_query_en\.json"):
        load_tasks(tmp_path, "en")
    copy_of_the_benchmark(tmp_path, full_tasks[:1])
    (tmp_path / "database/database_en/id_0/hotels/hotels.csv").unlink()
    with pytest.raises(UserError, match=r"lacks hotels/hotels\.csv"):
        load_tasks(tmp_path, "en")
    (tmp_path / "data" / "travelplanning_query_en.json").write_text("[{}]")
    with pytest.raises(UserError, match="cannot be read as travel queries"):
        load_tasks(tmp_path, "en")
    with pytest.raises(UserError, match=r"unzip database_en\.zip"):
        _ = load_tasks(queries, "en")[0].tables


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": 1}'])
def test_a_damaged_task_file_names_its_line(tmp_path, line):
    (tmp_path / "tasks.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"(line|record) 1"):
        read_task_file(tmp_path / "tasks.jsonl")


def test_the_split_keeps_twins_together_and_holds_out_every_length(queries):
    tasks = [*load_tasks(queries, "en"), *load_tasks(queries, "zh")]
    train, held_out = split_tasks(tasks, 0.8, seed=0)
    assert (len(train), len(held_out)) == (192, 48)
    assert not {task.id for task in train} & {task.id for task in held_out}
    # 20 trips of each length, two to seven days: 4 of each in each language.
    assert Counter(task.meta["days"] for task in held_out) == dict.fromkeys(range(2, 8), 8)
    assert split_tasks(tasks, 0.8, seed=0) == (train, held_out) and split_tasks(tasks, 0.8, seed=1)[1] != held_out


def test_equal_seeds_give_equal_tasks_and_more_tasks_begin_alike():
    assert generate_tasks(3, 0) == generate_tasks(5, 0)[:3] and generate_tasks(3, 0) != generate_tasks(3, 1)
    assert pocket_tasks(3, 0) == pocket_tasks(5, 0)[:3]
    assert pocket_tasks(3, 0, "eval")[0].tables != pocket_tasks(3, 0, "train")[0].tables


def test_generated_tasks_are_never_called_by_the_benchmarks_name(full_tasks, compact_tasks, word_tasks):
    for task in [*full_tasks, *compact_tasks, *word_tasks]:
        assert task.source == "synthetic-travel" and "deepplanning" not in json.dumps(task.to_json()).lower()


def test_compact_tables_hold_three_to_five_rows_a_call(compact_tasks):
    for task in compact_tasks:
        assert all(3 <= len(task.tables[name]) <= 5 for name in ("hotels", "attractions"))
        near = Counter(row["nearby_attraction_name"] for row in task.tables["restaurants"])
        assert set(near.values()) == {3} and task.meta["days"] == 2


def test_the_answers_of_generated_tasks_are_unique(compact_tasks, full_tasks):
    seen = set()
    for task in [*compact_tasks, *full_tasks, *generate_tasks(120, 8)]:
        for key, gold in task.constraints.items():
            if key in ("train_cheapest_direct", "flight_cheapest_direct"):
                kind = key.split("_")[0]
                rows = [r for r in task.tables[f"{kind}s"] if r["origin_city"] == task.meta["org"]]
                least = min(float(r["price"]) for r in rows)
                found, right = (
                    [r[f"{kind}_no"] for r in rows if float(r["price"]) == least],
                    gold[f"outbound_{kind}_no"],
                )
            elif key == "hotel_highest_rated":
                rows = task.tables["hotels"]
                most = max(float(r["score"]) for r in rows)
                found, right = [r["name"] for r in rows if float(r["score"]) == most], gold["hotel_name"]
            elif key == "attraction_type_highest_rated":
                (right,) = gold["attraction_names"]
                kind = next(r["attraction_type"] for r in task.tables["attractions"] if r["attraction_name"] == right)
                rows = [r for r in task.tables["attractions"] if r["attraction_type"] == kind]
                most = max(float(r["rating"]) for r in rows)
                found = [r["attraction_name"] for r in rows if float(r["rating"]) == most]
            else:
                continue
            assert found == [right]
            seen.add(key)
    assert len(seen) == 4


def test_in_the_word_form_a_value_names_one_row_and_the_overall_best_hotel_misleads():
    tasks = pocket_tasks(300, seed=9)
    misled = 0
    for task in tasks:
        for table, columns in (
            ("hotels", ("price", "score")),
            ("trains", ("price", "dep_datetime")),
            ("restaurants", ("price_per_person", "rating")),
        ):
            for column in columns:
                values = [row[column][-8:] for row in task.tables[table]]
                assert len(set(values)) == len(values)
        words = {word for word in golds(task).values()} | set(task.query.split())
        assert words <= set(vocabulary()) and len(task.query.split()) == 8
        key = next(key for key in task.constraints if key.startswith("hotel_"))
        best = max if CONSTRAINTS[key] == "Hr" else min
        overall = best(task.tables["hotels"], key=lambda row: int(row["score" if best is max else "price"]))
        misled += overall["name"] != task.constraints[key]["hotel_name"]
    assert 0.8 <= misled / len(tasks) <= 0.9


def test_the_command_writes_a_recorded_split(tmp_path, full_tasks, capsys):
    copy_of_the_benchmark(tmp_path / "copy", full_tasks[:10])
    main(out=tmp_path / "out", deepplanning_root=tmp_path / "copy", langs=("en",), seed=1)
    record = json.loads((tmp_path / "out" / "split.json").read_text())
    train, held_out = (read_task_file(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "held_out"))
    assert record["train"] == [f"en/{task.id}" for task in train] and len(train) + len(held_out) == 10
    assert train[0].tables == full_tasks[int(train[0].id)].tables  # by the folder that the line names
    assert len(record["sha256"]["travelplanning_query_en.json"]) == 64
    main(out=tmp_path / "own", synthetic="words", train=3, held_out=2)
    assert "synthetic-travel" in capsys.readouterr().out.splitlines()[-1]
    assert "deepplanning" not in (tmp_path / "own" / "split.json").read_text().lower()
    assert len(read_task_file(tmp_path / "own" / "train.jsonl")) == 3


def test_the_command_says_what_it_lacks(tmp_path, queries):
    for arguments, says in (
        ({}, "give either"),
        ({"synthetic": "full", "train": 0}, "--train 0"),
        ({"deepplanning_root": queries}, "unzip database_en"),
    ):
        with pytest.raises(UserError, match=says):
            main(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
