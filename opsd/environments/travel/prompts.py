"""System messages. The benchmark's own come from a user's copy of it; these are ours."""

from __future__ import annotations

from opsd.environments.travel.task import TravelTask

_COMPACT = """You plan trips with tools. First collect what you need by calling tools, then answer with one plan and \
nothing else:

<plan>
Day 1:
Current City: from A to B
Accommodation: Hotel, ¥300/room/night
08:00-10:00 | travel_intercity_public | train G1, Station - Station, ¥100/person
10:00-10:20 | buffer | Leaving the station
10:20-10:50 | travel_city | Station - Hotel, 5km, 30min, ¥20
10:50-11:20 | hotel | Check-in, Hotel
11:20-13:20 | attraction | Attraction, ¥50/person
13:20-14:20 | meal | Lunch, Restaurant, ¥80/person
**Budget Summary**
**Total Estimated Budget: 550 RMB**
</plan>

The last day has Accommodation: - and ends with the trip home. Use names exactly as the tools return them."""

_RULES = """

Rules of the plan:
- Ask the user nothing: the request is complete. Every name, time and price comes from a tool's answer, unchanged.
- Each day has its header lines and then activities in order of time, each beginning when the one before ends. The \
types are travel_intercity_public, travel_city, attraction, meal, hotel and buffer. Between two places there is a \
travel_city line with the route's distance, minutes and cost.
- Meals take 1 to 2 hours within the restaurant's hours (no breakfast), visits the suggested time within opening \
hours. Every day but the last ends in the hotel.
- Trains and flights keep the times that the tools return. Leave time before and after them.
- Prices: trains, flights, meals and tickets per person, a room per night, a ride in town per car of four.
- No restaurant and no attraction twice."""


def system_prompt(task: TravelTask) -> str:
    """The system message of our own tasks, and of the benchmark's if its folder is not given; words need none."""
    return {"full": _COMPACT + _RULES, "compact": _COMPACT, "words": ""}[task.form]
