"""Scores a plan: which hard constraints it satisfies, and separately whether it is a valid plan at all.

A constraint holds if the gold names occur anywhere in the plan; the budget is recomputed from the lines. That is the
benchmark's rule; its own score is all-or-nothing (`hard_all`), the paper's Table 7 is the fraction (`hard_fraction`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opsd.environments.travel.plan import Plan

NO_PLAN = "no closed <plan> block"


@dataclass(frozen=True)
class PlanScore:
    """hard: for each constraint's key, whether the plan satisfies it. hard_fraction: the fraction it satisfies.

    hard_all: all hold. delivered: there was a plan block. valid: it has the form of a plan for this task
    (problems says why not); not part of the score. cost: yuan, from the plan's lines. commonsense, composite
    and case_acc come from the benchmark's own evaluator and are None without it.
    """

    hard: dict[str, bool]
    delivered: bool
    valid: bool
    problems: list[str] = field(default_factory=list)
    cost: float | None = None
    commonsense: float | None = None

    @property
    def hard_fraction(self) -> float:
        """Fraction of the constraints that hold; 0 if there are none."""
        return sum(self.hard.values()) / len(self.hard) if self.hard else 0.0

    @property
    def hard_all(self) -> bool:
        """The benchmark's veto score."""
        return bool(self.hard) and all(self.hard.values())

    @property
    def composite(self) -> float | None:
        """The benchmark's mean of commonsense and veto score."""
        return None if self.commonsense is None else (self.commonsense + float(self.hard_all)) / 2

    @property
    def case_acc(self) -> float | None:
        """1.0 if both are perfect."""
        return None if self.commonsense is None else float(self.commonsense == 1.0 and self.hard_all)


def score_plan(plan: Plan | None, meta: dict[str, Any]) -> PlanScore:
    """The score of a parsed plan; None is no plan: every constraint fails."""
    keys = meta.get("hard_constraints", {})
    if plan is None:
        return PlanScore(dict.fromkeys(keys, False), delivered=False, valid=False, problems=[NO_PLAN])
    problems = plan_problems(plan, meta)
    return PlanScore(hard_constraints(plan, meta), True, not problems, problems, plan_cost(plan.daily_plans, meta))


def hard_constraints(plan: Plan, meta: dict[str, Any]) -> dict[str, bool]:
    """For each constraint of the task, whether the plan satisfies it; a key of an unknown kind never holds."""
    days = plan.daily_plans
    trips = _details(days, "travel_intercity_public")
    named = {
        "flight": {d["number"] for d in trips if d["mode"] == "flight"},
        "train": {d["number"] for d in trips if d["mode"] == "train"},
        "hotel": {day["accommodation"]["name"] for day in days if "accommodation" in day},
        "restaurant": {d["name"] for d in _details(days, "meal")},
        "attraction": {d["name"] for d in _details(days, "attraction")},
    }
    held = {}
    for key, gold in meta.get("hard_constraints", {}).items():
        kind = key.split("_", 1)[0]
        if key == "budget_constraint":
            limit = _as_number(gold.get("max_budget"))
            held[key] = bool(days) and limit is not None and plan_cost(days, meta) <= limit
        elif kind in named:
            golds = _golds(kind, gold)
            held[key] = golds is not None and named[kind].issuperset(golds)
        else:
            held[key] = False
    return held


def _golds(kind: str, gold: dict[str, Any]) -> list[str] | None:
    """The names that must appear; None if the task should name some and does not."""
    if kind in ("flight", "train"):
        return [gold[key] for key in (f"outbound_{kind}_no", f"inbound_{kind}_no") if key in gold]
    if kind == "attraction":
        return gold.get("attraction_names") or None
    name = gold.get(f"{kind}_name")
    return [name] if name else None


def plan_cost(days: list[dict[str, Any]], meta: dict[str, Any]) -> float:
    """The total cost of the plan's lines, in yuan, by the benchmark's rules.

    Per person: one intercity trip per day (the first: a transfer has its whole price on every segment), meals, tickets.
    Per car of four: trips in town. Per room: one night for every day but the last.
    """
    people, rooms = int(meta.get("people_number", 1)), int(meta.get("room_number", 1))
    cars = max(1, (people + 3) // 4)
    total = 0.0
    for day in days:
        trips = _details([day], "travel_intercity_public")
        total += people * sum(trip.get("cost", 0.0) for trip in trips[:1])
        total += people * sum(d.get("cost", 0.0) for kind in ("meal", "attraction") for d in _details([day], kind))
        total += cars * sum(d.get("cost", 0.0) for d in _details([day], "travel_city"))
    return total + rooms * sum(day.get("accommodation", {}).get("price_per_night", 0.0) for day in days[:-1])


def plan_problems(plan: Plan, meta: dict[str, Any]) -> list[str]:
    """Why this is not a valid plan for the task, as short lines; empty if it is."""
    days, wanted = plan.daily_plans, int(meta["days"])
    problems = [f"a line fits no form: {plan.unread[0][:80]}"] if plan.unread else []
    if [day["day_number"] for day in days] != list(range(1, wanted + 1)):
        problems.append(f"days {[day['day_number'] for day in days][:20]} instead of 1 to {wanted}")
    for place, day in enumerate(days):
        if not day["activities"]:
            problems.append(f"day {day['day_number']} has no activity")
        if "accommodation" not in day and place < len(days) - 1:
            problems.append(f"day {day['day_number']} has no accommodation")
        minutes = [minute for activity in day["activities"] for minute in _minutes(activity["time_slot"])]
        if minutes != sorted(minutes) or any(minute > 24 * 60 for minute in minutes):
            problems.append(f"day {day['day_number']} has times that overlap or run backwards")
    return problems


def _minutes(slot: str) -> list[int]:
    """Both ends of HH:MM-HH:MM, in minutes since midnight; an end at 00:00 is the next midnight."""
    ends = [part.strip() for part in slot.replace("–", "-").replace("—", "-").replace("~", "-").split("-")]
    start, end = (60 * int(hours) + int(minutes) for hours, _, minutes in (part.partition(":") for part in ends))
    return [start, end or 24 * 60]


def _details(days: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [activity["details"] for day in days for activity in day["activities"] if activity["type"] == kind]


def _as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
