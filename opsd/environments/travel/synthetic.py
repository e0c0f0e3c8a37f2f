"""synthetic-travel: generated trips with the benchmark's files, tools, plan grammar and constraint keys.

Cities, hotels and trains are made up. Each constraint's answer is computed from the tables; if two rows tie, the
database is drawn again. Every task is solvable: the oracle's plan satisfies all of its constraints.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import Any

from opsd.environments.travel.oracle import oracle_plan
from opsd.environments.travel.pocket import sample
from opsd.environments.travel.rules import draw_constraints
from opsd.environments.travel.score import plan_cost, score_plan
from opsd.environments.travel.task import Form, Row, Tables, TravelTask
from opsd.utils.seeding import below, derive_seed

CITIES = ("Arvenholm", "Belmarra", "Cordanel", "Dravik", "Elmsford", "Farrowgate", "Grenholt", "Halvery", "Istmere")
BRANDS = ("Lantern", "Meridian", "Northlight", "Oakhouse")
SERVICES = ("Swimming Pool", "Gym", "Free Parking", "Laundry", "Airport Shuttle", "Breakfast")
TYPES = ("Museum", "Park", "Historic Site")
CUISINES = ("Noodles", "Seafood", "Barbecue", "Vegetarian")
TAGS = ("Birthday Package", "Private Room", "Terrace", "Live Music", "Child Menu")
FIRST = (
    "Amber",
    "Birch",
    "Cedar",
    "Dawn",
    "Ember",
    "Fern",
    "Golden",
    "Harbour",
    "Ivory",
    "Juniper",
    "Kestrel",
    "Lilac",
)
PLACES = ("Tower", "Garden", "Gallery", "Bridge", "Palace", "Harbour Museum", "Old Town", "Lake")
TABLES = ("Kitchen", "Table", "Bistro", "Canteen", "Tavern", "Grill", "Teahouse", "Diner")
BUDGET_PROBABILITY = 0.3


@dataclass(frozen=True)
class Size:
    """Numbers of rows: hotels, attractions, restaurants near each attraction, trains and flights in each direction."""

    hotels: int
    attractions: int
    restaurants: int
    trains: int
    flights: int


FULL = Size(hotels=7, attractions=6, restaurants=4, trains=5, flights=4)
COMPACT = Size(hotels=4, attractions=3, restaurants=3, trains=3, flights=3)


def generate_tasks(n: int, seed: int, compact: bool = True) -> list[TravelTask]:
    """`n` generated tasks; equal (seed, number, compact) give equal tasks. compact: tables of 3 to 5 rows, two days."""
    name = "compact" if compact else "full"
    rngs = (Random(derive_seed(seed, "synthetic travel", name, number)) for number in range(n))
    return [_task(f"synthetic-{seed}-{number}", rng, compact) for number, rng in enumerate(rngs)]


def _task(name: str, rng: Random, compact: bool) -> TravelTask:
    """A task; databases are drawn until one has no ties and its oracle plan is perfect."""
    form: Form = "compact" if compact else "full"
    while True:
        meta = _trip(rng, 2 if compact else 2 + below(rng, 2))
        tables = make_tables(rng, COMPACT if compact else FULL, meta)
        drawn = draw_constraints(rng, tables, meta)
        if drawn is None:
            continue
        constraints, sentences = drawn
        meta["hard_constraints"] = constraints
        task = TravelTask(name, "en", "", meta, given=tables, form=form)
        plan = oracle_plan(task)
        if rng.random() < BUDGET_PROBABILITY:
            limit = round(plan_cost(plan.daily_plans, meta) * (1.1 + 0.2 * rng.random()))
            constraints["budget_constraint"] = {"max_budget": limit}
            sentences.append(f"The whole trip must not cost more than {limit} yuan.")
        score = score_plan(plan, meta)
        if score.hard_all and score.valid:
            return TravelTask(name, "en", _query(meta, sentences), meta, given=tables, form=form)


def _trip(rng: Random, days: int) -> dict[str, Any]:
    origin, destination = (CITIES[number - 1] for number in sample(rng, 2, len(CITIES)))
    start = date(2030, 1, 1) + timedelta(days=below(rng, 365))
    people = 1 + below(rng, 4)
    return {
        "org": origin,
        "dest": [destination],
        "days": days,
        "depart_date": start.isoformat(),
        "return_date": (start + timedelta(days=days - 1)).isoformat(),
        "depart_weekday": start.isoweekday(),
        "people_number": people,
        "room_number": (people + 1) // 2,
    }


def _query(meta: dict[str, Any], sentences: list[str]) -> str:
    people, rooms = meta["people_number"], meta["room_number"]
    who = "I travel alone" if people == 1 else f"There are {people} of us"
    return " ".join(
        [
            f"Please plan a trip of {meta['days']} days from {meta['org']} to {meta['dest'][0]}, leaving on",
            f"{meta['depart_date']} and coming back on {meta['return_date']}.",
            f"{who}; book {rooms} {'room' if rooms == 1 else 'rooms'}.",
            *sentences,
            "This is all that there is to know; do not ask, plan.",
        ]
    )


def make_tables(rng: Random, size: Size, meta: dict[str, Any]) -> Tables:
    """The seven tables of one trip."""
    city = meta["dest"][0]
    tables: Tables = {"trains": [], "flights": [], "hotels": [], "attractions": [], "restaurants": []}
    for direction in ("outbound", "inbound"):
        tables["trains"] += _connections(rng, "trains", size.trains, meta, direction)
        tables["flights"] += _connections(rng, "flights", size.flights, meta, direction)
    names = [FIRST[number - 1] for number in sample(rng, size.attractions, len(FIRST))]
    tables["hotels"] = _hotels(rng, size.hotels, city)
    tables["attractions"] = [_attraction(rng, f"{name} {PLACES[below(rng, len(PLACES))]}", city) for name in names]
    for attraction in tables["attractions"]:
        tables["restaurants"] += _restaurants(rng, size.restaurants, attraction, len(tables["restaurants"]))
    stations = [{"poi_name": station_of(city, kind), **_point(rng)} for kind in ("trains", "flights")]
    tables["locations"] = [
        {"poi_name": row[column], "latitude": row["latitude"], "longitude": row["longitude"], "poi_type": kind}
        for kind, column, rows in (
            ("station", "poi_name", stations),
            ("hotel", "name", tables["hotels"]),
            ("attraction", "attraction_name", tables["attractions"]),
            ("restaurant", "restaurant_name", tables["restaurants"]),
        )
        for row in rows
    ]
    tables["routes"] = [_road(a, b) for a in tables["locations"] for b in tables["locations"] if a is not b]
    return tables


def station_of(city: str, kind: str) -> str:
    """The one station or airport of a city."""
    return f"{city} Central Station" if kind == "trains" else f"{city} Airport"


def _connections(rng: Random, kind: str, count: int, meta: dict[str, Any], direction: str) -> list[Row]:
    """Direct trains or flights in one direction: outbound in the morning, inbound in the evening, all different."""
    out = direction == "outbound"
    cities = (meta["org"], meta["dest"][0]) if out else (meta["dest"][0], meta["org"])
    day, first = (meta["depart_date"], 8 * 60 + 30) if out else (meta["return_date"], 17 * 60)
    starts, lengths, prices = sample(rng, count, 20), sample(rng, count, 14), sample(rng, count, 60)
    rows = []
    for place in range(count):
        begin, duration = first + 5 * starts[place], 85 + 5 * lengths[place]
        number = f"{'G' if kind == 'trains' else 'AV'}{100 + below(rng, 900)}{place}"
        row = {
            "origin_city": cities[0],
            "destination_city": cities[1],
            "dep_date": day,
            "dep_station_code": station_of(cities[0], kind)[:3].upper(),
            "arr_station_code": station_of(cities[1], kind)[:3].upper(),
            "dep_station_name": station_of(cities[0], kind),
            "arr_station_name": station_of(cities[1], kind),
            "dep_datetime": f"{day} {begin // 60:02d}:{begin % 60:02d}:00",
            "arr_datetime": f"{day} {(begin + duration) // 60:02d}:{(begin + duration) % 60:02d}:00",
            "duration": str(duration),
            "seat_status": str(5 + below(rng, 15)),
            "price": f"{100 + 5 * prices[place]}.0",
            "route_index": str(place + (0 if out else count)),
            "segment_index": "1",
        }
        row |= (
            {"train_no": number, "train_type": "High-speed train", "seat_class": "Second Class Seat"}
            if kind == "trains"
            else {"flight_no": number, "airline": "Air Vantage", "seat_class": "Economy Class", **_AIRCRAFT}
        )
        rows.append(row)
    return rows


_AIRCRAFT = {"equip_size": "M", "equip_type": "320", "manufacturer": "Airbus"}


def _hotels(rng: Random, count: int, city: str) -> list[Row]:
    names, prices, scores = sample(rng, count, len(FIRST)), sample(rng, count, 60), sample(rng, count, 20)
    rows = []
    for place in range(count):
        brand = BRANDS[below(rng, len(BRANDS))]
        services = sample(rng, 2 + below(rng, 2), len(SERVICES))
        rows.append(
            {
                "name": f"{brand} Hotel {city} {FIRST[names[place] - 1]} Street",
                "address": f"{1 + below(rng, 200)} {FIRST[names[place] - 1]} Street",
                **_point(rng),
                "decoration_time": str(2010 + below(rng, 16)),
                "hotel_star": str(2 + below(rng, 3)),
                "price": f"{150 + 10 * prices[place]}.0",
                "score": f"{3 + scores[place] / 10:.1f}",
                "brand": brand,
                "services": ";".join(SERVICES[number - 1] for number in services),
            }
        )
    return rows


def _attraction(rng: Random, name: str, city: str) -> Row:
    kind = TYPES[below(rng, len(TYPES))]
    return {
        "attraction_id": str(1000 + below(rng, 9000)),
        "attraction_name": name,
        "city": city,
        "address": f"{1 + below(rng, 200)} {name} Road",
        **_point(rng),
        "description": f"A {kind.lower()} that visitors of {city} like",
        "rating": f"{3.5 + below(rng, 15) / 10:.1f}",
        "opening_time": "08:00",
        "closing_time": "21:00",
        "closing_dates": "Open daily",
        "min_visit_hours": "1.0",
        "max_visit_hours": "3.0",
        "ticket_price": f"{10 * below(rng, 10)}.0",
        "attraction_type": kind,
    }


def _restaurants(rng: Random, count: int, near: Row, first: int) -> list[Row]:
    """Restaurants near an attraction. Their names are unique in the city."""
    prices, ratings = sample(rng, count, 30), sample(rng, count, 15)
    rows = []
    for place in range(count):
        number = first + place
        name = f"{FIRST[number % len(FIRST)]} {TABLES[(number // len(FIRST) + place) % len(TABLES)]} No. {number + 1}"
        rows.append(
            {
                "restaurant_id": str(number + 1),
                "restaurant_name": name,
                **_point(rng, near),
                "price_per_person": f"{30 + 5 * prices[place]}.0",
                "cuisine": CUISINES[below(rng, len(CUISINES))],
                "opening_time": "10:00",
                "closing_time": "22:30",
                "nearby_attraction_name": near["attraction_name"],
                "rating": f"{3.4 + ratings[place] / 10:.1f}",
                "tags": ";".join(TAGS[tag - 1] for tag in sample(rng, 1 + below(rng, 2), len(TAGS))),
                "query_latitude": near["latitude"],
                "query_longitude": near["longitude"],
            }
        )
    return rows


def _point(rng: Random, near: Row | None = None) -> Row:
    """Coordinates with six decimals: in a city of some 10 km, or within 300 m of a place."""
    if near is None:
        return {"latitude": f"{30 + rng.random() / 10:.6f}", "longitude": f"{110 + rng.random() / 10:.6f}"}
    return {key: f"{float(near[key]) + (rng.random() - 0.5) / 200:.6f}" for key in ("latitude", "longitude")}


def _road(start: Row, end: Row) -> Row:
    """The road between two places; below 1 km it is walked and costs nothing."""
    away = (abs(float(start[key]) - float(end[key])) for key in ("latitude", "longitude"))
    meters = 100 + round(sum(away) * 100_000)
    return {
        "origin": f"{start['latitude']},{start['longitude']}",
        "destination": f"{end['latitude']},{end['longitude']}",
        "distance_meters": str(meters),
        "duration_minutes": str(5 + meters // 500),
        "cost": str(0 if meters < 1000 else 10 + meters // 500),
    }
