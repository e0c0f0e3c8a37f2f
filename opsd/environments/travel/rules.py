"""Constraints of synthetic-travel tasks: the benchmark's keys, each with exactly one answer in the tables."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from opsd.environments.travel.pocket import sample
from opsd.environments.travel.task import Row, Tables
from opsd.utils.seeding import below

Drawn = tuple[dict[str, Any], str]
"""A constraint's fields, and its sentence in the query."""


@dataclass(frozen=True)
class Extreme:
    """The row with the lowest (or highest) `column`. words: its name in a query."""

    column: str
    greatest: bool
    words: str

    def of(self, rows: list[Row]) -> Row | None:
        """That row, or None if the best two tie or there are no rows."""
        numbers = [_number(row[self.column]) for row in rows]
        if not numbers:
            return None
        wanted = max(numbers) if self.greatest else min(numbers)
        return rows[numbers.index(wanted)] if numbers.count(wanted) == 1 else None


TRANSPORT = {
    "train_cheapest_direct": ("outbound", Extreme("price", False, "the cheapest direct train")),
    "train_earliest_departure_direct": ("outbound", Extreme("dep_datetime", False, "the earliest direct train")),
    "train_shortest_duration_direct": ("outbound", Extreme("duration", False, "the fastest direct train")),
    "train_latest_arrival_direct": ("inbound", Extreme("arr_datetime", True, "the direct train that arrives last")),
    "flight_cheapest_direct": ("outbound", Extreme("price", False, "the cheapest direct flight")),
    "flight_earliest_departure_direct": ("outbound", Extreme("dep_datetime", False, "the earliest direct flight")),
    "flight_shortest_duration_direct": ("outbound", Extreme("duration", False, "the shortest direct flight")),
}
HOTEL = {
    "hotel_cheapest_star": ("hotel_star", Extreme("price", False, "the cheapest")),
    "hotel_star_highest_rated": ("hotel_star", Extreme("score", True, "the highest rated")),
    "hotel_cheapest_brand": ("brand", Extreme("price", False, "the cheapest")),
    "hotel_brand_highest_rated": ("brand", Extreme("score", True, "the highest rated")),
    "hotel_highest_rated": ("", Extreme("score", True, "the highest rated")),
    "hotel_star_service_required": ("services", Extreme("price", False, "the")),
}
RESTAURANT = {
    "restaurant_highest_rated": ("", Extreme("rating", True, "the highest rated restaurant")),
    "restaurant_cheapest_nearby_attraction": ("", Extreme("price_per_person", False, "the cheapest restaurant")),
    "restaurant_specific_tag_nearby": ("tags", Extreme("rating", True, "the restaurant")),
    "restaurant_specific_cuisine_nearby": ("cuisine", Extreme("rating", True, "the restaurant")),
    "restaurant_must_eat_named": ("restaurant_name", Extreme("rating", True, "")),
}
ATTRACTION = ("attraction_must_visit_named", "attraction_type_highest_rated", "attraction_all_of_type")


def draw_constraints(
    rng: Random, tables: Tables, meta: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[str]] | None:
    """One constraint each on transport, hotel, restaurant and attractions, and sentences; None if one has no unique
    answer."""
    found = {}
    sentences = []
    for keys, draw in (
        (list(TRANSPORT), _transport),
        (list(HOTEL), _hotel),
        (list(RESTAURANT), _restaurant),
        (list(ATTRACTION), _attraction),
    ):
        key = keys[below(rng, len(keys))]
        drawn = draw(rng, key, tables, meta)
        if drawn is None:
            return None
        found[key], sentence = drawn
        sentences.append(sentence)
    return found, sentences


def _transport(rng: Random, key: str, tables: Tables, meta: dict[str, Any]) -> Drawn | None:
    direction, extreme = TRANSPORT[key]
    kind = key.split("_")[0]
    start = meta["org"] if direction == "outbound" else meta["dest"][0]
    row = extreme.of([row for row in tables[f"{kind}s"] if row["origin_city"] == start])
    if row is None:
        return None
    way = "there" if direction == "outbound" else "back"
    return {f"{direction}_{kind}_no": row[f"{kind}_no"]}, f"On the way {way}, take {extreme.words}."


def _hotel(rng: Random, key: str, tables: Tables, meta: dict[str, Any]) -> Drawn | None:
    column, extreme = HOTEL[key]
    example = tables["hotels"][below(rng, len(tables["hotels"]))]
    rows, which = tables["hotels"], "hotel"
    if column == "hotel_star" or column == "services":
        rows, which = _same(rows, "hotel_star", example), f"{example['hotel_star']}-star hotel"
    elif column == "brand":
        rows, which = _same(rows, "brand", example), f"hotel of the brand {example['brand']}"
    if column == "services":
        services = example["services"].split(";")
        service = services[below(rng, len(services))]
        rows = [row for row in rows if service in row["services"].split(";")]
        which += f" that offers: {service}"
        if len(rows) > 1:
            return None
    row = extreme.of(rows)
    return None if row is None else ({"hotel_name": row["name"]}, f"Stay at {extreme.words} {which}.")


def _restaurant(rng: Random, key: str, tables: Tables, meta: dict[str, Any]) -> Drawn | None:
    column, extreme = RESTAURANT[key]
    example = tables["restaurants"][below(rng, len(tables["restaurants"]))]
    near = example["nearby_attraction_name"]
    name = {"attraction_name": near, "restaurant_name": example["restaurant_name"]}
    if column == "restaurant_name":
        return name, f"Have one meal at '{example['restaurant_name']}' near '{near}'."
    rows, which = _same(tables["restaurants"], "nearby_attraction_name", example), ""
    if column == "cuisine":
        rows, which = _same(rows, "cuisine", example), f" with the cuisine {example['cuisine']}"
    elif column == "tags":
        tag = example["tags"].split(";")[0]
        rows, which = [row for row in rows if tag in row["tags"].split(";")], f" that has: {tag}"
    if column and len(rows) > 1:
        return None
    row = extreme.of(rows)
    if row is None:
        return None
    return {
        **name,
        "restaurant_name": row["restaurant_name"],
    }, f"Have one meal at {extreme.words} near '{near}'{which}."


def _attraction(rng: Random, key: str, tables: Tables, meta: dict[str, Any]) -> Drawn | None:
    """At most two names: a trip of two days has time for no more visits."""
    rows = tables["attractions"]
    example = rows[below(rng, len(rows))]
    kind = example["attraction_type"]
    if key == "attraction_must_visit_named":
        rows = [rows[number - 1] for number in sample(rng, 2, len(rows))]
        sentence = f"Visit '{rows[0]['attraction_name']}' and '{rows[1]['attraction_name']}'."
    elif key == "attraction_all_of_type":
        rows = _same(rows, "attraction_type", example)
        sentence = f"Visit all attractions of the type {kind}."
    else:
        best = Extreme("rating", True, "").of(_same(rows, "attraction_type", example))
        rows = [] if best is None else [best]
        sentence = f"Visit the highest rated attraction of the type {kind}."
    names = [row["attraction_name"] for row in rows]
    return ({"attraction_names": names}, sentence) if 0 < len(names) <= 2 else None


def _same(rows: list[Row], column: str, example: Row) -> list[Row]:
    return [row for row in rows if row[column] == example[column]]


def _number(text: str) -> float:
    """A number, or a time `YYYY-MM-DD HH:MM:SS` as a number that sorts the same way."""
    return float(text.replace("-", "").replace(":", "").replace(" ", "")) if ":" in text else float(text)
