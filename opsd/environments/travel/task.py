"""Travel tasks: the query, the gold answers, and the seven tables that the tools read.

The format is that of the public DeepPlanning travel benchmark (query files, one database folder per task). Tasks that
we generate have the same format; their source is `synthetic-travel`.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from opsd.data.prompts import read_records
from opsd.utils.errors import DAMAGED, UserError, said
from opsd.utils.seeding import derive_seed

Row = dict[str, str]
Tables = dict[str, list[Row]]
Form = Literal["full", "compact", "words"]

FILES = {
    "trains": "trains/trains.csv",
    "flights": "flights/flights.csv",
    "hotels": "hotels/hotels.csv",
    "attractions": "attractions/attractions.csv",
    "restaurants": "restaurants/restaurants.csv",
    "locations": "locations/locations_coords.csv",
    "routes": "transportation/distance_matrix.csv",
}
"""The file of each table in a task's database folder."""

DEEPPLANNING, SYNTHETIC = "deepplanning", "synthetic-travel"
# Where the benchmark's travel part may be in the folder that a user names: that folder, its parent, or the repository.
_INSIDE = ("", "travelplanning", "benchmark/deepplanning/travelplanning")


@dataclass(frozen=True)
class TravelTask:
    """One trip to plan.

    meta: people_number, room_number, days, dates, cities, and hard_constraints {key: {gold fields}}. form: of the
    conversation: full (JSON tools), compact (the same, short prompt), words (one token per word, for tiny models).
    given: the tables themselves, or None if db_dir names the folder with them.
    """

    id: str
    lang: str
    query: str
    meta: dict[str, Any]
    db_dir: Path | None = None
    given: Tables | None = None
    form: Form = "full"
    source: str = SYNTHETIC

    @property
    def constraints(self) -> dict[str, dict[str, Any]]:
        """The hard constraints by key."""
        return self.meta.get("hard_constraints", {})

    @property
    def tables(self) -> Tables:
        """The seven tables by name; all values are text. Raises UserError if the task has no database."""
        if self.given is not None:
            return self.given
        self.check_database()
        assert self.db_dir is not None
        return read_tables(self.db_dir)

    def check_database(self) -> None:
        """Raises UserError if a table's file is missing; reads none of them."""
        if self.given is None and (self.db_dir is None or not all((self.db_dir / f).is_file() for f in FILES.values())):
            raise UserError(
                f"travel task {self.id} ({self.lang}) has no complete database; unzip database_{self.lang}.zip into "
                "database/ beside data/, and write the task files again"
            )

    def to_json(self) -> dict[str, Any]:
        """The task as plain JSON values: a line of a task file."""
        values = {"id": self.id, "lang": self.lang, "form": self.form, "source": self.source, "query": self.query}
        where = (
            {"tables": self.given}
            if self.given is not None
            else {"db_dir": "" if self.db_dir is None else str(self.db_dir.resolve())}
        )
        return {**values, "meta": self.meta, **where}


def from_json(values: dict[str, Any], where: str) -> TravelTask:
    """The inverse of `TravelTask.to_json`. Raises UserError for a line that is not a task."""
    what, give = f"{where} is not a travel task", "write it with python -m opsd.environments.travel"
    with said(what, give, *DAMAGED):
        folder, tables = values.get("db_dir"), values.get("tables")
        texts = [values[name] for name in ("lang", "query", "form", "source")]
        if not all(isinstance(text, str) for text in texts) or values["form"] not in get_args(Form):
            raise TypeError("lang, query, form and source must be texts, form one of " + ", ".join(get_args(Form)))
        if not isinstance(values["meta"], dict) or not isinstance(values["meta"].get("hard_constraints", {}), dict):
            raise TypeError("meta must be an object, and so its hard_constraints")
        if tables is not None and not (
            isinstance(tables, dict) and all(isinstance(tables.get(t), list) for t in FILES)
        ):
            raise TypeError(f"tables must hold {', '.join(FILES)}")
        return TravelTask(
            id=str(values["id"]),
            lang=values["lang"],
            query=values["query"],
            meta=values["meta"],
            db_dir=Path(folder) if folder else None,
            given=tables,
            form=values["form"],
            source=values["source"],
        )


def load_tasks(root: str | Path, lang: str) -> list[TravelTask]:
    """The benchmark's tasks of one language ("en" | "zh") from a user's copy of it.

    root: the folder of its travel part (or its repository) with data/travelplanning_query_LANG.json and, if tools are
    to be called, database/database_LANG/id_N/. Raises UserError for files that are missing or damaged.
    """
    folder = travel_folder(Path(root))
    name = f"travelplanning_query_{lang}.json"
    file = next((path for path in (folder / "data" / name, folder / name) if path.is_file()), None)
    if file is None:
        raise UserError(f"{root} holds no {name}; give the folder of the DeepPlanning travel benchmark")
    with said(f"{file} cannot be read as travel queries", "fetch it again", *DAMAGED):
        records = json.loads(file.read_text(encoding="utf-8"))
        found = [(str(record["id"]), record["query"], record["meta_info"]) for record in records]
    databases = folder / "database" / f"database_{lang}"
    return [
        TravelTask(number, lang, query, meta, _database(databases, number), source=DEEPPLANNING)
        for number, query, meta in found
    ]


def travel_folder(root: Path) -> Path:
    """The folder of the benchmark's travel part within `root`; `root` itself if none is recognised."""
    folders = [root / inside for inside in _INSIDE]
    return next((folder for folder in folders if (folder / "data").is_dir() or (folder / "tools").is_dir()), root)


def _database(databases: Path, number: str) -> Path | None:
    """One task's database folder; None if the user has no databases. Raises UserError for an incomplete one."""
    if not databases.is_dir():
        return None
    folder = databases / f"id_{number}"
    lacking = [file for file in FILES.values() if not (folder / file).is_file()]
    if lacking:
        raise UserError(f"{folder} lacks {lacking[0]}; unzip the database again")
    return folder


@lru_cache(maxsize=256)
def read_tables(folder: Path) -> Tables:
    """The seven CSV files of one database; every value is text, so that coordinates keep their digits."""
    tables = {}
    for name, file in FILES.items():
        with (
            said(f"{folder / file} cannot be read", "unzip the database again", OSError, ValueError, csv.Error),
            (folder / file).open(newline="", encoding="utf-8-sig") as lines,
        ):
            tables[name] = [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(lines)]
    return tables


def read_task_file(path: str | Path) -> list[TravelTask]:
    """The tasks of a file (.jsonl, one task per line). Raises UserError if it is missing, empty or damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"task file {path} does not exist; write one with python -m opsd.environments.travel")
    return [from_json(values, f"{path} record {number}") for number, values in enumerate(read_records(path), start=1)]


def write_task_file(tasks: list[TravelTask], path: Path) -> None:
    """Write the tasks as a file that `read_task_file` reads."""
    lines = (json.dumps(task.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n" for task in tasks)
    path.write_text("".join(lines), encoding="utf-8")


def split_tasks(tasks: list[TravelTask], train_fraction: float, seed: int) -> tuple[list[TravelTask], list[TravelTask]]:
    """Training and held-out tasks: split by id (the languages of a trip stay together), equally for each length.

    The ids of each number of days are shuffled by `seed`; the first round(train_fraction·count) of them train. (The
    benchmark's ids are sorted by length: simply taking the last fifth would hold out only the longest trips.)
    """
    by_days: dict[int, set[str]] = {}
    for task in tasks:
        by_days.setdefault(int(task.meta["days"]), set()).add(task.id)
    train: set[str] = set()
    for days, ids in sorted(by_days.items()):
        rng = Random(derive_seed(seed, "travel split", days))
        shuffled = sorted(sorted(ids), key=lambda _, rng=rng: rng.random())
        train |= set(shuffled[: round(train_fraction * len(ids))])
    return [task for task in tasks if task.id in train], [task for task in tasks if task.id not in train]
