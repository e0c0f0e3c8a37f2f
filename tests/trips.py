"""Plans of generated trips as text, right ones and broken ones, and their tables as files."""

import copy
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opsd.environments.travel.plan import Plan
from opsd.environments.travel.task import FILES, Tables, TravelTask
from opsd.environments.travel.words import _KINDS, _NAME_COLUMNS, CONSTRAINTS, SECTIONS, value_word

_NAMED = {
    "restaurant": ("meal", "name"),
    "attraction": ("attraction", "name"),
    "train": ("travel_intercity_public", "number"),
    "flight": ("travel_intercity_public", "number"),
}
"""Where a plan names what a constraint of each kind speaks of."""


def without(plan: Plan, task: TravelTask, key: str) -> Plan:
    """`plan` with one constraint broken and every other one left as it is: wrong names, or a dinner too dear."""
    broken, kind = copy.deepcopy(plan), key.split("_")[0]
    for day in broken.daily_plans:
        if kind == "hotel" and "accommodation" in day:
            day["accommodation"]["name"] = "Another hotel"
        for activity in day["activities"]:
            if kind == "budget" and activity["type"] == "meal":
                activity["details"]["cost"] = 2.0 * float(task.constraints[key]["max_budget"])
            where, name = _NAMED.get(kind, ("", ""))
            if activity["type"] == where:
                activity["details"][name] = f"Another {kind}"
    return broken


def plan_text(plan: Plan) -> str:
    """A plan in the grammar that `parse_plan` reads, with its <plan> tags."""
    lines = ["<plan>"]
    for day in plan.daily_plans:
        stay = day.get("accommodation")
        where = "-" if stay is None else f"{stay['name']}, ¥{stay['price_per_night']:g}/room/night"
        lines += [f"Day {day['day_number']}:", f"Current City: {day['current_city']}", f"Accommodation: {where}"]
        lines += [f"{a['time_slot']} | {a['type']} | {_line(a['type'], a['details'])}" for a in day["activities"]]
        lines.append("")
    total = 0.0 if plan.total_budget is None else plan.total_budget
    return "\n".join([*lines, "**Budget Summary**:", f"**Total Estimated Budget: {total:g} RMB**", "</plan>"])


def _line(kind: str, d: dict[str, Any]) -> str:
    if kind == "buffer":
        return d["description"]
    if kind == "hotel":
        return f"{d['activity']}, {d['name']}"
    if kind == "attraction":
        return f"{d['name']}, ¥{d['cost']:g}/person"
    if kind == "meal":
        return f"{d['meal_type']}, {d['name']}, ¥{d['cost']:g}/person"
    route = f"{d['from']} - {d['to']}"
    if kind == "travel_city":
        return f"{route}, {d['distance']}, {d['duration']}, ¥{d['cost']:g}"
    return f"{d['mode']} {d['number']}, {route}, ¥{d['cost']:g}/person"


def golds(task: TravelTask) -> dict[str, str]:
    """For each section of the plan, the word that fills it rightly."""
    return {section: word for section, word in _gold_words(task)}


def _gold_words(task: TravelTask) -> Iterator[tuple[str, str]]:
    for key, gold in task.constraints.items():
        section = next(s for s, table in SECTIONS.items() if CONSTRAINTS[key] in _KINDS[table])
        table, column = SECTIONS[section], _NAME_COLUMNS[SECTIONS[section]]
        name = gold.get("hotel_name") or gold.get("restaurant_name") or gold.get("outbound_train_no")
        row = next(row for row in task.tables[table] if row[column] == name)
        yield section, value_word(CONSTRAINTS[key], row)


def write_tables(tables: Tables, folder: Path) -> None:
    """The tables as the seven CSV files that the benchmark's own tools read."""
    for name, file in FILES.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = tables[name]
        with path.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, list(rows[0]) if rows else ["none"])
            writer.writeheader()
            writer.writerows(rows)
