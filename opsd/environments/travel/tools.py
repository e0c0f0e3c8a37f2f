"""The nine tools: which rows of the seven tables a call finds. `show` turns the rows into text.

As in the benchmark, hotels and recommended attractions ignore city and dates (a database belongs to one task), and
coordinates match as text, digit by digit.
"""

from __future__ import annotations

import json
from typing import Any

from opsd.environments.travel.task import Row, Tables

Arguments = dict[str, str]

PARAMETERS: dict[str, dict[str, str]] = {
    "query_train_info": {
        "origin": "City of departure",
        "destination": "City of arrival",
        "depDate": "Date of departure, YYYY-MM-DD",
        "seatClassName?": "Seat class, e.g. Second Class Seat",
    },
    "query_flight_info": {
        "origin": "City of departure",
        "destination": "City of arrival",
        "depDate": "Date of departure, YYYY-MM-DD",
        "seatClassName?": "Seat class, e.g. Economy Class",
    },
    "query_hotel_info": {
        "destination": "City",
        "checkinDate": "First night, YYYY-MM-DD",
        "checkoutDate": "Day of leaving, YYYY-MM-DD",
        "hotelStar?": "Stars, 1 to 5",
        "hotelBrands?": "One brand",
    },
    "query_attraction_details": {"attraction_name": "Exact name of an attraction"},
    "recommend_attractions": {"city": "City", "attraction_type?": "Type of attraction"},
    "search_location": {"place_name": "Exact name of a hotel, attraction, restaurant, station or airport"},
    "query_road_route_info": {
        "origin": "Coordinates as latitude,longitude with 6 decimals",
        "destination": "Coordinates as latitude,longitude with 6 decimals",
    },
    "recommend_restaurants": {
        "latitude": "Latitude of an attraction, 6 decimals",
        "longitude": "Longitude of an attraction, 6 decimals",
    },
    "query_restaurant_details": {"restaurant_name": "Exact name of a restaurant"},
}
"""Each tool's parameters and their meaning; all are text, those with a ? are optional."""

DESCRIPTIONS = {
    "query_train_info": "Trains between two cities on a date: numbers, times, stations, seats, price.",
    "query_flight_info": "Flights between two cities on a date: numbers, times, airports, seats, aircraft, price.",
    "query_hotel_info": "Hotels: name, coordinates, stars, price per room and night, score, brand, services.",
    "query_attraction_details": "One attraction: coordinates, rating, opening hours, visit hours, ticket price, type.",
    "recommend_attractions": "Names and types of the city's attractions, without prices.",
    "search_location": "Coordinates of a place by its name.",
    "query_road_route_info": "Distance, minutes and taxi cost between two coordinates.",
    "recommend_restaurants": "Restaurants near an attraction, by the attraction's coordinates.",
    "query_restaurant_details": "One restaurant: coordinates, price per person, cuisine, opening hours, rating, tags.",
}
# The benchmark's system prompt mentions a tool that its schemas do not have.
ALIASES = {"recommend_around_restaurants": "recommend_restaurants"}


class CallError(Exception):
    """A call that cannot be answered; the message tells the model what to fix."""


def schemas() -> list[dict[str, Any]]:
    """The nine tools in the form that chat templates take."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": DESCRIPTIONS[name],
                "parameters": {
                    "type": "object",
                    "properties": {
                        key.rstrip("?"): {"type": "string", "description": meaning}
                        for key, meaning in parameters.items()
                    },
                    "required": [key for key in parameters if not key.endswith("?")],
                },
            },
        }
        for name, parameters in PARAMETERS.items()
    ]


def read_call(name: Any, arguments: Any) -> tuple[str, Arguments]:
    """The tool's name (aliases resolved) and its arguments as text. Raises CallError for any mistake of the model."""
    if not isinstance(name, str) or ALIASES.get(name, name) not in PARAMETERS:
        raise CallError(f"There is no tool {_short(name)}. The tools are: {', '.join(PARAMETERS)}.")
    name = ALIASES.get(name, name)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise CallError(f"The arguments of {name} are not JSON: {_short(arguments)}. Give a JSON object.") from None
    if not isinstance(arguments, dict):
        raise CallError(f"The arguments of {name} are {_short(arguments)}. Give a JSON object.")
    known = {key.rstrip("?"): key.endswith("?") for key in PARAMETERS[name]}
    read = {}
    for key, optional in known.items():
        value = arguments.get(key)
        if value is None or value == "":
            if not optional:
                raise CallError(f"{name} lacks the argument {key}. It takes: {', '.join(known)}.")
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            read[key] = _text(value)
        else:
            raise CallError(f"{name}: the argument {key} is {_short(value)}. Give a text.")
    return name, read


def find(name: str, arguments: Arguments, tables: Tables) -> list[Row]:
    """The rows that a call (as returned by `read_call`) finds, in the order in which they are shown; [] if none.

    Trains and flights: segments of matching routes, route by route.
    """
    table, columns = _PLACES[name]
    wanted = {column: arguments[key] for key, column in columns.items() if key in arguments}
    rows = [row for row in tables[table] if all(row.get(key) == value for key, value in wanted.items())]
    if columns is _TRIP:
        rows.sort(key=lambda row: (row["route_index"], row["segment_index"]))
    return rows[:1] if name in _OF_ONE else rows


_TRIP = {
    "origin": "origin_city",
    "destination": "destination_city",
    "depDate": "dep_date",
    "seatClassName": "seat_class",
}
# The table that each tool searches, and the column that each argument must equal.
_PLACES = {
    "query_train_info": ("trains", _TRIP),
    "query_flight_info": ("flights", _TRIP),
    "query_hotel_info": ("hotels", {"hotelStar": "hotel_star", "hotelBrands": "brand"}),
    "query_attraction_details": ("attractions", {"attraction_name": "attraction_name"}),
    "recommend_attractions": ("attractions", {"attraction_type": "attraction_type"}),
    "search_location": ("locations", {"place_name": "poi_name"}),
    "query_road_route_info": ("routes", {"origin": "origin", "destination": "destination"}),
    "recommend_restaurants": ("restaurants", {"latitude": "query_latitude", "longitude": "query_longitude"}),
    "query_restaurant_details": ("restaurants", {"restaurant_name": "restaurant_name"}),
}
# Tools that return the first row only.
_OF_ONE = {"query_attraction_details", "search_location", "query_road_route_info", "query_restaurant_details"}


def _text(value: str | int | float) -> str:
    """A value as text; a whole number without a decimal point: 3.0 stars are "3"."""
    return str(int(value)) if isinstance(value, float) and value % 1 == 0 else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
