"""A planner that knows the answers: it proves that a generated task can be solved, and gives the plan that does it.

It fills a timetable from the tables, day by day: the outbound trip in the morning, one visit on days of travel, two on
other days, lunch and dinner if there is time, the trip home in the evening.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opsd.environments.travel.plan import Plan
from opsd.environments.travel.score import plan_cost
from opsd.environments.travel.task import Row, Tables, TravelTask

VISIT_MINUTES, MEAL_MINUTES = 120, 60
LUNCH, DINNER, MORNING, NIGHT = 11 * 60 + 30, 18 * 60, 8 * 60 + 30, 23 * 60


@dataclass
class _Day:
    """One day's timetable. now: minutes since midnight; at: the current place."""

    tables: Tables
    now: int
    at: str
    activities: list[dict[str, Any]] = field(default_factory=list)

    def add(self, minutes: int, kind: str, **details: Any) -> None:
        """Add one line of the plan that starts now and lasts `minutes`."""
        slot = "-".join(f"{at // 60:02d}:{at % 60:02d}" for at in (self.now, self.now + minutes))
        self.activities.append({"time_slot": slot, "type": kind, "details": details})
        self.now += minutes

    def wait_until(self, minute: int, why: str) -> None:
        """Add a buffer until `minute`, if that is later than now."""
        if minute > self.now:
            self.add(minute - self.now, "buffer", description=why)

    def go(self, place: str) -> None:
        """Go to a place by the road that the route tool would return."""
        if place == self.at:
            return
        points = {row["poi_name"]: f"{row['latitude']},{row['longitude']}" for row in self.tables["locations"]}
        ends = points[self.at], points[place]
        road = next(row for row in self.tables["routes"] if (row["origin"], row["destination"]) == ends)
        names = {"from": self.at, "to": place, "distance": f"{int(road['distance_meters']) / 1000:g}km"}
        minutes = int(road["duration_minutes"])
        self.add(minutes, "travel_city", **names, duration=f"{minutes}min", cost=float(road["cost"]))
        self.at = place

    def visit(self, row: Row) -> None:
        """Go to an attraction and see it."""
        self.go(row["attraction_name"])
        self.add(VISIT_MINUTES, "attraction", name=row["attraction_name"], cost=float(row["ticket_price"]))

    def eat(self, row: Row, meal: str, not_before: int) -> None:
        """Go to a restaurant and eat there, from `not_before` (minutes) on."""
        self.go(row["restaurant_name"])
        self.wait_until(not_before, "Free time")
        cost = float(row["price_per_person"])
        self.add(MEAL_MINUTES, "meal", meal_type=meal, name=row["restaurant_name"], cost=cost)

    def ride(self, row: Row, kind: str) -> None:
        """Add the intercity trip; its price is per person."""
        minutes = _minute(row["arr_datetime"]) - _minute(row["dep_datetime"])
        ends = {"from": row["dep_station_name"], "to": row["arr_station_name"]}
        number = row[f"{kind}_no"]
        self.add(minutes, "travel_intercity_public", mode=kind, number=number, **ends, cost=float(row["price"]))
        self.at = row["arr_station_name"]


def oracle_plan(task: TravelTask) -> Plan:
    """A plan that satisfies every constraint of a generated task."""
    tables, meta = task.tables, task.meta
    visits, meals = _in_order(task, "attraction"), _in_order(task, "restaurant")
    hotel = _in_order(task, "hotel")[0]
    days = []
    for number in range(1, meta["days"] + 1):
        first, last = number == 1, number == meta["days"]
        day = _Day(tables, MORNING, hotel["name"])
        if first:
            _arrive(day, *_trip(task, "outbound"), hotel["name"])
        day.visit(visits.pop(0))
        if not first:
            day.eat(meals.pop(0), "Lunch", LUNCH)
        if not first and not last:
            day.visit(visits.pop(0))
        if last:
            _leave(day, *_trip(task, "inbound"))
        else:
            day.eat(meals.pop(0), "Dinner", DINNER)
            day.go(hotel["name"])
            day.add(NIGHT - day.now, "hotel", activity="Rest", name=hotel["name"])
        days.append(_as_day(number, day, meta, None if last else hotel))
    return Plan(days, plan_cost(days, meta))


def _arrive(day: _Day, row: Row, kind: str, hotel: str) -> None:
    day.now = _minute(row["dep_datetime"])
    day.ride(row, kind)
    day.add(40, "buffer", description="Leaving the station")
    day.go(hotel)
    day.add(30, "hotel", activity="Check-in", name=hotel)


def _leave(day: _Day, row: Row, kind: str) -> None:
    day.wait_until(_minute(row["dep_datetime"]) - 150, "Free time")
    day.go(row["dep_station_name"])
    day.wait_until(_minute(row["dep_datetime"]), "Security check")
    day.ride(row, kind)


def _trip(task: TravelTask, direction: str) -> tuple[Row, str]:
    """The row of one direction and "train" or "flight": the one that a constraint names, else the first train."""
    start = task.meta["org"] if direction == "outbound" else task.meta["dest"][0]
    for gold in task.constraints.values():
        for kind in ("train", "flight"):
            if number := gold.get(f"{direction}_{kind}_no"):
                return next(row for row in task.tables[f"{kind}s"] if row[f"{kind}_no"] == number), kind
    return next(row for row in task.tables["trains"] if row["origin_city"] == start), "train"


def _in_order(task: TravelTask, kind: str) -> list[Row]:
    """A table's rows; those that a constraint names come first."""
    column = {"attraction": "attraction_name", "restaurant": "restaurant_name", "hotel": "name"}[kind]
    golds = [gold for key, gold in task.constraints.items() if key.startswith(f"{kind}_")]
    names = {name for gold in golds for name in gold.get("attraction_names", [gold.get(f"{kind}_name")])}
    return sorted(task.tables[f"{kind}s"], key=lambda row: row[column] not in names)


def _as_day(number: int, day: _Day, meta: dict[str, Any], hotel: Row | None) -> dict[str, Any]:
    city = meta["dest"][0]
    route = {1: f"from {meta['org']} to {city}", meta["days"]: f"from {city} to {meta['org']}"}.get(number, city)
    made = {"day_number": number, "current_city": route, "activities": day.activities}
    if hotel is not None:
        made["accommodation"] = {"name": hotel["name"], "price_per_night": float(hotel["price"])}
    return made


def _minute(moment: str) -> int:
    """Minutes since midnight of `YYYY-MM-DD HH:MM:SS`."""
    return 60 * int(moment[11:13]) + int(moment[14:16])
