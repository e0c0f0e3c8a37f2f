"""The nine tools: what they find, what they show, and that a wrong call is answered and never raises."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.environments.travel import TravelEnv, TravelTask, generate_tasks
from opsd.environments.travel.tools import PARAMETERS, schemas

TASK = generate_tasks(1, seed=5)[0]


def ask(env, name, task=TASK, **arguments):
    return env.call(name, arguments, task)


def trip(task):
    return {"origin": task.meta["org"], "destination": task.meta["dest"][0], "depDate": task.meta["depart_date"]}


def test_trains_come_route_by_route_with_the_price_beside_the_segments(env):
    routes = json.loads(ask(env, "query_train_info", **trip(TASK)))
    assert len(routes) == 3
    for (route,) in routes:
        assert set(route) == {"Segment 1", "price"} and route["Segment 1"]["depCityName"] == TASK.meta["org"]
        row = next(r for r in TASK.tables["trains"] if r["train_no"] == route["Segment 1"]["marketingTransportNo"])
        assert (route["price"], route["Segment 1"]["duration"]) == (float(row["price"]), int(row["duration"]))
        assert route["Segment 1"]["Remaining Seats"] == row["seat_status"]


def test_flights_are_not_nested_and_name_the_aircraft(env):
    routes = json.loads(ask(env, "query_flight_info", **trip(TASK), seatClassName="Economy Class"))
    assert routes[0]["Segment 1"]["manufacturer"] == "Airbus"
    assert ask(env, "query_flight_info", **trip(TASK), seatClassName="First Class").startswith("Nothing was found")


def test_a_transfer_is_one_route_and_the_second_train_starts_where_the_first_ended(env):
    row = {**TASK.tables["trains"][0], "seat_status": ""}
    first = {**row, "route_index": "0", "segment_index": "1", "arr_station_name": "Midway Station", "price": "70.0"}
    second = {**row, "route_index": "0", "segment_index": "2", "train_no": "G2", "price": "99.0"}
    task = TravelTask("t", "en", "", TASK.meta, given={**TASK.tables, "trains": [second, first]})
    ((route,),) = json.loads(ask(env, "query_train_info", task, **trip(TASK)))
    assert list(route) == ["Segment 1", "Segment 2", "price"] and route["price"] == 70.0
    assert route["Segment 2"]["depCityName"] == "Midway" and route["Segment 1"]["Remaining Seats"] == "Available"


def test_hotels_filter_by_star_and_brand_and_ignore_city_and_dates(env):
    nights = {"destination": "Anywhere", "checkinDate": "x", "checkoutDate": "y"}
    hotels = json.loads(ask(env, "query_hotel_info", **nights))
    assert [hotel["name"] for hotel in hotels] == [row["name"] for row in TASK.tables["hotels"]]
    star = hotels[0]["hotelStar"]
    for given_star in (star, int(star), float(star)):  # models write numbers where a text is asked for
        found = json.loads(ask(env, "query_hotel_info", **nights, hotelStar=given_star))
        assert {hotel["hotelStar"] for hotel in found} == {star}
    assert {h["brand"] for h in json.loads(ask(env, "query_hotel_info", **nights, hotelBrands=hotels[0]["brand"]))} == {
        hotels[0]["brand"]
    }
    assert isinstance(hotels[0]["services"], list)


def test_restaurants_are_found_by_the_exact_coordinates_of_an_attraction(env):
    attraction = TASK.tables["attractions"][0]["attraction_name"]
    place = json.loads(ask(env, "search_location", place_name=attraction))
    found = json.loads(ask(env, "recommend_restaurants", latitude=place["latitude"], longitude=place["longitude"]))
    assert len(found) == 3 and {r["nearby_attraction_name"] for r in found} == {attraction}
    details = json.loads(ask(env, "query_restaurant_details", restaurant_name=found[0]["name"]))
    assert {k: v for k, v in details.items() if k != "id"} == found[0]
    rounded = ask(env, "recommend_restaurants", latitude=place["latitude"][:-1], longitude=place["longitude"])
    assert rounded.startswith("Nothing was found")
    # The benchmark's prompt calls this tool by a name that it does not have.
    assert env.call("recommend_around_restaurants", place, TASK) == env.call("recommend_restaurants", place, TASK)


def test_attractions_are_lines_of_text(env):
    lines = ask(env, "recommend_attractions", city="x").splitlines()
    assert lines[0] == "Recommended attractions:" and len(lines) == 2 + len(TASK.tables["attractions"])
    row = TASK.tables["attractions"][0]
    details = ask(env, "query_attraction_details", attraction_name=row["attraction_name"])
    assert f"Ticket Price：{float(row['ticket_price'])} RMB" in details and "Opening Hours：08:00 to 21:00" in details
    assert f"这是一个{row['attraction_type']}类型的景点" in TravelEnv().call(
        "recommend_attractions", {"city": "x"}, TravelTask("t", "zh", "", {}, given=TASK.tables)
    )


def test_roads_are_in_meters_minutes_and_yuan(env):
    row = TASK.tables["routes"][0]
    road = json.loads(ask(env, "query_road_route_info", origin=row["origin"], destination=row["destination"]))
    assert road["distance_in_meters"] == int(row["distance_meters"]) and road["cost"] == int(row["cost"])
    assert ask(env, "query_road_route_info", origin="1,2", destination="3,4").startswith("Nothing was found")


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("query_weather", {}, "There is no tool 'query_weather'. The tools are: query_train_info"),
        (None, {}, "There is no tool None"),
        (["search_location"], {}, "There is no tool"),
        ("search_location", {}, "search_location lacks the argument place_name. It takes: place_name."),
        ("search_location", "{", "The arguments of search_location are not JSON"),
        ("search_location", "[" * 100_000, "The arguments of search_location are not JSON"),
        ("search_location", [], "The arguments of search_location are []. Give a JSON object."),
        ("search_location", {"place_name": {"a": 1}}, "the argument place_name is {'a': 1}. Give a text."),
        ("search_location", {"place_name": True}, "Give a text."),
        ("search_location", {"place_name": float("nan")}, "Nothing was found for nan"),
    ],
)
def test_a_wrong_call_is_told_what_to_mend(env, name, arguments, says):
    assert says in env.call(name, arguments, TASK)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6), lambda v: st.lists(v, max_size=3)
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from([*PARAMETERS, "x", ""]) | json_values,
    st.dictionaries(st.sampled_from(["origin", "place_name", "latitude", "x"]), json_values) | json_values,
)
def test_no_call_raises(name, arguments):
    assert isinstance(TravelEnv().call(name, arguments, TASK), str)


def test_the_schemas_are_those_of_the_benchmark_but_for_their_words(queries):
    shape = lambda found: [  # noqa: E731
        (
            f["function"]["name"],
            sorted(f["function"]["parameters"]["properties"]),
            sorted(f["function"]["parameters"]["required"]),
        )
        for f in found
    ]
    places = (queries, queries.parent / "tools")
    file = next(folder / "tool_schema_en.json" for folder in places if (folder / "tool_schema_en.json").exists())
    theirs = json.loads(file.read_text())
    assert sorted(shape(schemas())) == sorted(shape(theirs)) and len(theirs) == 9
