"""Tasks in the word form: each has its own random database and three constraints; a table has each value only once.

In 85 % of the tasks the best hotel of all has the wrong number of stars, so that asking for `any` misleads.
"""

from __future__ import annotations

from random import Random

from opsd.environments.travel.task import Row, Tables, TravelTask
from opsd.environments.travel.words import CONSTRAINTS, DATES, GO, QUERY, STARS, VALUES, coordinate, date_of, value_word
from opsd.utils.seeding import below, derive_seed

STARS_SHOWN, HOTELS_PER_STAR = 3, 3
ATTRACTIONS, RESTAURANTS_PER_ATTRACTION = 3, 4
TRAINS_PER_DATE = 4
MISLEADING = 0.85
ORIGIN, DESTINATION = "Origin", "Destination"


def pocket_tasks(n: int, seed: int, part: str = "tasks") -> list[TravelTask]:
    """`n` tasks in the word form; equal (seed, part, number) give equal tasks. part: names a separate random stream."""
    return [
        _task(f"{part}-{number}", Random(derive_seed(seed, "pocket planning", part, number))) for number in range(n)
    ]


def sample(rng: Random, count: int, limit: int) -> list[int]:
    """`count` different numbers from 1 … limit, in random order."""
    return sorted(range(1, limit + 1), key=lambda _: rng.random())[:count]


def _task(name: str, rng: Random) -> TravelTask:
    tables: Tables = {"flights": [], "routes": [], "trains": _trains(rng), "hotels": _hotels(rng)}
    tables |= _attractions(rng)
    asked = [_hotel(rng, tables), _restaurant(rng, tables), _train(rng, tables)]
    asked.sort(key=lambda _: rng.random())
    meta = {
        "org": ORIGIN,
        "dest": DESTINATION,
        "days": 1,
        "depart_date": date_of(1),
        "people_number": 1,
        "room_number": 1,
        "hard_constraints": {key: gold for key, _, gold in asked},
    }
    query = " ".join([QUERY, *(word for key, argument, _ in asked for word in (key, argument)), GO])
    return TravelTask(name, "en", query, meta, given=tables, form="words")


def best(rows: list[Row], kind: str) -> Row:
    """The row that a constraint on values of `kind` asks for: the highest rating, or the lowest of other values."""
    values = [int(value_word(kind, row)[2:]) for row in rows]
    return rows[values.index(max(values) if kind.endswith("r") else min(values))]


Asked = tuple[str, str, dict[str, str]]
"""A constraint's key, the word that its query names, and its gold."""


def _hotel(rng: Random, tables: Tables) -> Asked:
    key = ("hotel_cheapest_star", "hotel_star_highest_rated")[below(rng, 2)]
    hotels = tables["hotels"]
    overall = best(hotels, CONSTRAINTS[key])["hotel_star"]
    others = sorted({row["hotel_star"] for row in hotels} - {overall})
    star = others[below(rng, len(others))] if rng.random() < MISLEADING else overall
    chosen = best([row for row in hotels if row["hotel_star"] == star], CONSTRAINTS[key])
    return key, f"s{star}", {"hotel_name": chosen["name"]}


def _restaurant(rng: Random, tables: Tables) -> Asked:
    key = ("restaurant_cheapest_nearby_attraction", "restaurant_highest_rated")[below(rng, 2)]
    attraction = tables["attractions"][below(rng, ATTRACTIONS)]["attraction_name"]
    near = [row for row in tables["restaurants"] if row["nearby_attraction_name"] == attraction]
    chosen = best(near, CONSTRAINTS[key])
    return key, attraction, {"attraction_name": attraction, "restaurant_name": chosen["restaurant_name"]}


def _train(rng: Random, tables: Tables) -> Asked:
    key = ("train_cheapest_direct", "train_earliest_departure_direct")[below(rng, 2)]
    date = DATES[below(rng, len(DATES))]
    chosen = best([row for row in tables["trains"] if row["dep_date"] == date_of(date)], CONSTRAINTS[key])
    return key, f"d{date}", {"outbound_train_no": chosen["train_no"]}


def _trains(rng: Random) -> list[Row]:
    count = len(DATES) * TRAINS_PER_DATE
    prices, hours = sample(rng, count, VALUES), sample(rng, count, VALUES)
    return [
        {
            "origin_city": ORIGIN,
            "destination_city": DESTINATION,
            "dep_date": date_of(DATES[place // TRAINS_PER_DATE]),
            "dep_datetime": f"{date_of(DATES[place // TRAINS_PER_DATE])} {hours[place]:02d}:00:00",
            "train_no": f"G{place + 1}",
            "seat_class": "Second Class Seat",
            "price": str(prices[place]),
            "route_index": str(place),
            "segment_index": "1",
        }
        for place in range(count)
    ]


def _hotels(rng: Random) -> list[Row]:
    count = STARS_SHOWN * HOTELS_PER_STAR
    stars = [STARS[number - 1] for number in sample(rng, STARS_SHOWN, len(STARS))] * HOTELS_PER_STAR
    prices, scores = sample(rng, count, VALUES), sample(rng, count, VALUES)
    return [
        {
            "name": f"Hotel {place + 1}",
            "hotel_star": str(stars[place]),
            "price": str(prices[place]),
            "score": str(scores[place]),
        }
        for place in range(count)
    ]


def _attractions(rng: Random) -> Tables:
    """Three attractions, each with its own coordinate and four restaurants."""
    names, places = sample(rng, ATTRACTIONS, VALUES), sample(rng, ATTRACTIONS, VALUES)
    count = ATTRACTIONS * RESTAURANTS_PER_ATTRACTION
    prices, ratings = sample(rng, count, VALUES), sample(rng, count, VALUES)
    attractions, locations, restaurants = [], [], []
    for number, place in zip(names, places, strict=True):
        at = {"latitude": coordinate(place), "longitude": coordinate(place)}
        attractions.append({"attraction_name": f"A{number}", **at})
        locations.append({"poi_name": f"A{number}", **at})
        for _ in range(RESTAURANTS_PER_ATTRACTION):
            restaurants.append(
                {
                    "restaurant_name": f"Restaurant {len(restaurants) + 1}",
                    "nearby_attraction_name": f"A{number}",
                    "query_latitude": coordinate(place),
                    "query_longitude": coordinate(place),
                    "price_per_person": str(prices[len(restaurants)]),
                    "rating": str(ratings[len(restaurants)]),
                }
            )
    return {"attractions": attractions, "locations": locations, "restaurants": restaurants}
