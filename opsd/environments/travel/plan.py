"""Parses a written plan by fixed rules: no model is involved, the same text always gives the same plan.

The grammar is the benchmark's: `Day N:`, `Current City:`, `Accommodation:`, then lines `HH:MM-HH:MM | type | details`.
The result has the structure that the benchmark's evaluator takes. The benchmark joins all <plan> blocks of a text; we
read the last closed one after the last </think>. Time is linear in the text; one over MAX_CHARACTERS counts as no plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

MAX_CHARACTERS = 200_000
ACTIVITIES = ("travel_intercity_public", "travel_city", "attraction", "meal", "hotel", "buffer")

_MODES = {
    **dict.fromkeys(("flight", "airplane", "plane", "航班", "飞机"), "flight"),
    **dict.fromkeys(("train", "railway", "火车", "高铁", "动车", "列车"), "train"),
}
_FREE = {"free", "free entry", "免费"}
_DAY = re.compile(r"day\s*(\d{1,4})\s*[:：]?$", re.IGNORECASE)
_CITY = re.compile(r"current city\s*[:：]\s*(.*)", re.IGNORECASE)
_ACCOMMODATION = re.compile(r"accommodation\s*[:：]\s*(.*)", re.IGNORECASE)
_SUMMARY = re.compile(r"budget summary", re.IGNORECASE)
_SLOT = re.compile(r"(\d{1,2}:\d{2})\s*[-–—~]\s*(\d{1,2}:\d{2})$")
_AMOUNT = re.compile(r"(?:[¥￥]\s*)?(\d[\d,]{0,15}(?:\.\d{1,6})?)")
# Each run of blanks matches in one way only: with two ways, a line of blanks would take quadratic time.
_TOTAL = re.compile(r"total estimated budget\s*[:：]\s*(?:[¥￥]\s*)?(\d[\d,]{0,15}(?:\.\d{1,6})?)", re.IGNORECASE)


@dataclass
class Plan:
    """A parsed plan. daily_plans: as the benchmark's evaluator takes them. unread: lines of a day that fit no form."""

    daily_plans: list[dict[str, Any]] = field(default_factory=list)
    total_budget: float | None = None
    unread: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The plan as the benchmark's evaluator takes it."""
        summary = {} if self.total_budget is None else {"total_estimated_budget": self.total_budget}
        return {"budget_summary": summary, "daily_plans": self.daily_plans}


def plan_block(text: str) -> str | None:
    """The text in the last closed <plan> block after the last </think>; None if there is no such block."""
    if len(text) > MAX_CHARACTERS:
        return None
    answer = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    end = answer.rfind("</plan>")
    start = answer.rfind("<plan>", 0, max(end, 0))
    if end < 0 or start < 0:
        return None
    return answer[start + len("<plan>") : end]


def parse_plan(block: str) -> Plan:
    """The plan in a block. A line that cannot be read is left out and, within a day, listed as unread."""
    plan = Plan()
    in_summary = False
    for raw in block.splitlines():
        line = raw.replace("**", "").replace("｜", "|").strip().lstrip("#*•").strip()
        if not line:
            continue
        if total := _TOTAL.search(line):
            plan.total_budget = _amount(total[1])
        if day := _DAY.match(line):
            plan.daily_plans.append({"day_number": int(day[1]), "current_city": "", "activities": []})
            in_summary = False
        elif _SUMMARY.match(line):
            in_summary = True
        elif plan.daily_plans and not in_summary and not _read_line(line, plan.daily_plans[-1]):
            plan.unread.append(line)
    return plan


def _read_line(line: str, day: dict[str, Any]) -> bool:
    """Add one line to its day; False if it fits none of the forms."""
    if city := _CITY.match(line):
        day["current_city"] = city[1].strip()
        return True
    if hotel := _ACCOMMODATION.match(line):
        name, price = split_price(hotel[1].strip())
        if name.strip(" -–—") and name.strip().lower() not in {"none", "无"}:
            day["accommodation"] = {"name": name, **({} if price is None else {"price_per_night": price})}
        return True
    parts = [part.strip() for part in line.lstrip("- ").split("|", 2)]
    if len(parts) < 3 or not _SLOT.match(parts[0]) or parts[1].lower() not in ACTIVITIES:
        return False
    kind = parts[1].lower()
    day["activities"].append({"time_slot": parts[0], "type": kind, "details": _details(kind, parts[2])})
    return True


def _details(kind: str, text: str) -> dict[str, Any]:
    """The fields of one activity's text."""
    if kind == "buffer":
        return {"description": text}
    if kind == "hotel":
        activity, name = _cut(text)
        return {"activity": activity, "name": name} if name else {"activity": "", "name": activity}
    rest, price = split_price(text)
    cost = {} if price is None else {"cost": price}
    if kind == "attraction":
        return {"name": rest, **cost}
    if kind == "meal":
        meal, name = _cut(rest)
        return {"meal_type": meal, "name": name, **cost} if name else {"meal_type": "", "name": meal, **cost}
    if kind == "travel_city":
        route, *measures = _commas_from_the_right(rest, 2)
        names = dict(zip(("distance", "duration"), measures, strict=False))
        return {**_route(route), **names, **cost}
    vehicle, route = _cut(rest)
    word, _, number = vehicle.partition(" ")
    return {"mode": _MODES.get(word.lower(), word), "number": number.strip(), **_route(route), **cost}


def split_price(text: str) -> tuple[str, float | None]:
    """`name, ¥60/person` gives ("name", 60.0); the name may contain commas. Without a price: (text, None)."""
    sign = max(text.rfind("¥"), text.rfind("￥"))
    if sign < 0:
        name, last = _last_comma(text)
        if last.lower() in _FREE:
            return name, 0.0
        amount = _AMOUNT.match(last) if last.lower().endswith(("rmb", "yuan", "元")) else None
        return (name, _amount(amount[1])) if amount else (text, None)
    amount = _AMOUNT.match(text, sign)
    if amount is None:
        return text, None
    return text[:sign].rstrip().rstrip(",，").rstrip(), _amount(amount[1])


def _route(text: str) -> dict[str, str]:
    """`A - B`, split at the first " - "; no hard constraint reads the two parts."""
    start, _, end = text.partition(" - ")
    return {"from": start.strip(), "to": end.strip()}


def _cut(text: str) -> tuple[str, str]:
    """The parts before and after the first comma; without a comma the second is empty."""
    match = re.search("[,，]", text)
    return (text[: match.start()].strip(), text[match.end() :].strip()) if match else (text.strip(), "")


def _last_comma(text: str) -> tuple[str, str]:
    place = max(text.rfind(","), text.rfind("，"))
    return (text[:place].strip(), text[place + 1 :].strip()) if place >= 0 else (text, "")


def _commas_from_the_right(text: str, count: int) -> list[str]:
    """The rest, then at most `count` parts split off at commas from the right, in order."""
    parts: list[str] = []
    while len(parts) < count:
        text, last = _last_comma(text)
        if not last:
            break
        parts.insert(0, last)
    return [text, *parts]


def _amount(digits: str) -> float:
    return float(digits.replace(",", ""))
