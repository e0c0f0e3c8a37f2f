"""The word form: the same tasks, tools and scores, one token per word, for tiny models.

    <q> restaurant_highest_rated A6 hotel_cheapest_star s3 train_cheapest_direct d1 <go>
    <call> query_train_info d1 </call> <rows> T¥4 Tt9 T¥1 Tt7 … </rows> <note> T¥1 <call> search_location A6 </call> …
    <plan> Accommodation H¥5 meal Rr12 travel_intercity_public T¥1 </plan>

A row has no name here: it is identified by a value that no other row of its table has (H¥5 is the hotel that costs 5,
Rr12 the restaurant rated 12, Tt7 the train that leaves at 7). A turn ends after </call> or at the end of the answer.
"""

from __future__ import annotations

from opsd.environments.travel.plan import Plan
from opsd.environments.travel.task import Row, Tables, TravelTask
from opsd.environments.travel.tools import Arguments, CallError

VALUES = 12
STARS = (2, 3, 4, 5)
DATES = (1, 2)
CALL, END_CALL, ROWS, END_ROWS = "<call>", "</call>", "<rows>", "</rows>"
QUERY, GO, NOTE, PLAN, END_PLAN = "<q>", "<go>", "<note>", "<plan>", "</plan>"
ANY, NONE, ERROR = "any", "none", "error"

SECTIONS = {"Accommodation": "hotels", "meal": "restaurants", "travel_intercity_public": "trains"}
"""The plan's three slots and the table that each is filled from."""
CONSTRAINTS = {
    "hotel_cheapest_star": "H¥",
    "hotel_star_highest_rated": "Hr",
    "restaurant_cheapest_nearby_attraction": "R¥",
    "restaurant_highest_rated": "Rr",
    "train_cheapest_direct": "T¥",
    "train_earliest_departure_direct": "Tt",
}
"""Constraint keys and the kind of value that decides each: ¥ and t ask for the lowest, r for the highest."""
TOOLS = ("query_train_info", "query_hotel_info", "search_location", "recommend_restaurants")
_KINDS = {"hotels": ("H¥", "Hr"), "restaurants": ("R¥", "Rr"), "trains": ("T¥", "Tt")}
_TABLE_OF = {"query_train_info": "trains", "query_hotel_info": "hotels", "recommend_restaurants": "restaurants"}


def vocabulary() -> list[str]:
    """All words, in a fixed order."""
    marks = [QUERY, GO, CALL, END_CALL, ROWS, END_ROWS, NOTE, PLAN, END_PLAN, ANY, NONE, ERROR]
    numbered = [f"{kind}{value}" for kind in (*CONSTRAINTS.values(), "A", "X") for value in range(1, VALUES + 1)]
    letters = [f"s{star}" for star in STARS] + [f"d{date}" for date in DATES]
    return [*marks, *TOOLS, *CONSTRAINTS, *SECTIONS, *letters, *numbered]


def value_word(kind: str, row: Row) -> str:
    """The word for a row's value of one kind, e.g. H¥5."""
    columns = {"H¥": "price", "Hr": "score", "R¥": "price_per_person", "Rr": "rating", "T¥": "price"}
    if kind == "Tt":
        return f"Tt{int(row['dep_datetime'][11:13])}"
    return f"{kind}{row[columns[kind]]}"


def coordinate(place: int) -> str:
    """The coordinate (latitude and longitude are equal) that the word X{place} stands for."""
    return f"{place}.000000"


def date_of(number: int) -> str:
    """The date that the word d{number} stands for."""
    return f"2030-01-{number:02d}"


def read_turn(words: list[str], meta: dict[str, object]) -> tuple[str, Arguments] | None:
    """The call that ends a turn, as tool and arguments; None if the turn ends without one.

    Raises CallError for a call that is not of the form `<call> TOOL WORD </call>`.
    """
    if not words or words[-1] != END_CALL:
        return None
    if len(words) < 4 or words[-4] != CALL:
        raise CallError("a call is <call> TOOL WORD </call>")
    tool, word = words[-3], words[-2]
    kind, number = word[:1], word[1:]
    if tool == "query_hotel_info" and (word == ANY or (kind == "s" and _small(number))):
        star = {} if word == ANY else {"hotelStar": number}
        return tool, {"destination": str(meta["dest"]), "checkinDate": date_of(1), "checkoutDate": date_of(2), **star}
    if tool == "query_train_info" and kind == "d" and _small(number):
        return tool, {"origin": str(meta["org"]), "destination": str(meta["dest"]), "depDate": date_of(int(number))}
    if tool == "search_location" and kind == "A":
        return tool, {"place_name": word}
    if tool == "recommend_restaurants" and kind == "X" and _small(number):
        return tool, {"latitude": coordinate(int(number)), "longitude": coordinate(int(number))}
    raise CallError(f"{tool} does not take {word}")


def show_rows(tool: str, rows: list[Row]) -> list[str]:
    """The words of a tool's answer: two per row, or the place's coordinate."""
    if not rows:
        found = [NONE]
    elif tool == "search_location":
        found = [f"X{int(float(rows[0]['latitude']))}"]
    else:
        found = [value_word(kind, row) for row in rows for kind in _KINDS[_TABLE_OF[tool]]]
    return [ROWS, *found, END_ROWS]


def show_error() -> list[str]:
    """The words that answer a call that cannot be read."""
    return [ROWS, ERROR, END_ROWS]


def read_plan(block: str, task: TravelTask) -> Plan:
    """The plan in a block of words, with the structure of any other plan."""
    day: dict[str, object] = {"day_number": 1, "current_city": str(task.meta["dest"])}
    activities: list[dict[str, object]] = []
    unread = []
    words = block.split()
    place = 0
    while place < len(words):
        table = SECTIONS.get(words[place])
        if table is None or place + 1 == len(words):
            unread.append(words[place])
            place += 1
            continue
        name = _name_of(words[place + 1], table, task.tables)
        if table == "hotels":
            day["accommodation"] = {"name": name}
        else:
            details = {"name": name} if table == "restaurants" else {"mode": "train", "number": name}
            slot = f"{len(activities):02d}:00-{len(activities) + 1:02d}:00"
            activities.append({"time_slot": slot, "type": words[place], "details": details})
        place += 2
    day["activities"] = activities
    unread += [section for section in SECTIONS if section not in words]
    return Plan(daily_plans=[day], unread=unread)


_NAME_COLUMNS = {"hotels": "name", "restaurants": "restaurant_name", "trains": "train_no"}


def _name_of(word: str, table: str, tables: Tables) -> str:
    """The name of the row that a word stands for; if there is none, the word itself (which equals no gold)."""
    kind = word[:2]
    if kind in _KINDS[table]:
        for row in tables[table]:
            if value_word(kind, row) == word:
                return row[_NAME_COLUMNS[table]]
    return word


def _small(number: str) -> bool:
    """Whether the rest of a word is a number that could be in the tables."""
    return number.isdecimal() and len(number) <= 2
