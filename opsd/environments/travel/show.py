"""A tool's answer: the rows found, in the benchmark's own format (JSON with an indent of 2, or lines of text)."""

from __future__ import annotations

import json
import math
from typing import Any

from opsd.environments.travel.task import Row
from opsd.environments.travel.tools import Arguments

_LABELS = {
    "en": {
        "segment": "Segment {}",
        "seats": "Remaining Seats",
        "enough": "Available",
        "station": " Station",
        "recommended": "Recommended attractions:\n",
        "one": "{name}, {text}. This is a {kind} type attraction",
        "id": "Attraction ID",
        "name": "Attraction Name",
        "city": "City",
        "address": "Address",
        "place": "Coordinates：Latitude {}，Longitude {}",
        "text": "Description",
        "rating": "Rating：{}(average visitor rating)",
        "hours": "Opening Hours",
        "to": "to",
        "closed": "Closed Dates",
        "least": "Minimum Visit Duration：{} hours",
        "most": "Maximum Visit Duration：{} hours",
        "price": "Ticket Price：{} RMB",
        "kind": "Attraction Type",
        "none": "Nothing was found for {}. Use names, dates and coordinates exactly as tools return them.",
    },
    "zh": {
        "segment": "第{}段",
        "seats": "剩余票数量",
        "enough": "充足",
        "station": "站",
        "recommended": "推荐的景点有：\n",
        "one": "{name}，{text}这是一个{kind}类型的景点",
        "id": "景点ID",
        "name": "景点名称",
        "city": "所属城市",
        "address": "地址",
        "place": "经纬度坐标：纬度 {}，经度 {}",
        "text": "景点简介",
        "rating": "用户评分：{}（游客平均评价）",
        "hours": "开放时间",
        "to": "至",
        "closed": "闭馆日期",
        "least": "建议最短游玩时长：{} 小时",
        "most": "建议最长游玩时长：{} 小时",
        "price": "门票价格：{} 元",
        "kind": "景点类型",
        "none": "未找到 {} 的信息，请使用与工具返回结果完全一致的名称、日期和坐标",
    },
}
_FLIGHT_EXTRAS = {"equipSize": "equip_size", "equipType": "equip_type", "manufacturer": "manufacturer"}


def show(name: str, arguments: Arguments, rows: list[Row], lang: str) -> str:
    """The answer to a call: `rows` as the benchmark shows them, or one line if there are none."""
    labels = _LABELS.get(lang, _LABELS["en"])
    if not rows:
        missing = labels["none"].format(", ".join(arguments.values()))
        if name == "query_restaurant_details":
            return _json({"message": missing, "restaurant_name": arguments["restaurant_name"]})
        return missing
    if name == "query_attraction_details":
        return _attraction(rows[0], labels)
    if name == "recommend_attractions":
        return "\n".join([labels["recommended"], *(_recommended(row, labels) for row in rows)])
    if name == "query_train_info":
        return _json([[route] for route in _routes(rows, labels, "train_type", "train_no", {})])
    if name == "query_flight_info":
        return _json(_routes(rows, labels, "airline", "flight_no", _FLIGHT_EXTRAS))
    if name == "query_hotel_info":
        return _json([_hotel(row) for row in rows])
    if name == "recommend_restaurants":
        return _json([_restaurant(row) for row in rows])
    if name == "query_restaurant_details":
        return _json({"id": rows[0]["restaurant_id"], **_restaurant(rows[0])})
    if name == "query_road_route_info":
        return _json(_road(rows[0]))
    return _json({"place_name": rows[0]["poi_name"], **_fields(rows[0], "latitude", "longitude")})


def _routes(
    rows: list[Row], labels: dict[str, str], kind: str, number: str, extras: dict[str, str]
) -> list[dict[str, Any]]:
    """Segments grouped by route; the price of a route is in its first segment."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["route_index"], []).append(row)
    routes = []
    for segments in grouped.values():
        route: dict[str, Any] = {}
        for place, row in enumerate(segments):
            start = row["origin_city"]
            if place and not extras:  # a train continues from where the previous segment ended
                start = segments[place - 1]["arr_station_name"].split(labels["station"])[0]
            route[labels["segment"].format(place + 1)] = {
                **_fields(row, arrCityName="destination_city", arrStationCode="arr_station_code"),
                "arrStationName": row["arr_station_name"],
                "depCityName": start,
                **_fields(row, depStationCode="dep_station_code", depStationName="dep_station_name"),
                "duration": _whole(row["duration"]),
                **_fields(row, arrDateTime="arr_datetime", depDateTime="dep_datetime"),
                "marketingTransportName": row[kind],
                "marketingTransportNo": row[number],
                "seatClassName": row["seat_class"],
                labels["seats"]: row["seat_status"].strip() or labels["enough"],
                **_fields(row, **extras),
            }
        routes.append({**route, "price": _number(segments[0]["price"]) or 0})
    return routes


def _hotel(row: Row) -> dict[str, Any]:
    return {
        **_fields(row, "name", "address", "latitude", "longitude"),
        **_fields(row, decorationTime="decoration_time", hotelStar="hotel_star"),
        **_fields(row, "price", "score", "brand"),
        **_list("services", row),
    }


def _restaurant(row: Row) -> dict[str, Any]:
    return {
        **_fields(row, name="restaurant_name"),
        **_fields(row, "latitude", "longitude", "price_per_person", "cuisine", "opening_time", "closing_time"),
        **_fields(row, "nearby_attraction_name", "rating"),
        **_list("tags", row),
    }


def _road(row: Row) -> dict[str, Any]:
    return {
        **_fields(row, "origin", "destination"),
        "distance_in_meters": _whole(row["distance_meters"]),
        "duration_in_minutes": _whole(row["duration_minutes"]),
        "cost": _whole(row["cost"]),
    }


def _recommended(row: Row, labels: dict[str, str]) -> str:
    return labels["one"].format(name=row["attraction_name"], text=row["description"], kind=row["attraction_type"])


def _attraction(row: Row, labels: dict[str, str]) -> str:
    opens, closes = row["opening_time"], row["closing_time"]
    hours = opens if opens == closes else f"{opens} {labels['to']} {closes}"
    rating, least, most = (_number(row[key]) for key in ("rating", "min_visit_hours", "max_visit_hours"))
    price = _number(row["ticket_price"])
    return "\n".join(
        [
            f"{labels['id']}：{row['attraction_id']}",
            f"{labels['name']}：{row['attraction_name']}",
            f"{labels['city']}：{row['city']}",
            f"{labels['address']}：{row['address']}",
            labels["place"].format(row["latitude"], row["longitude"]),
            f"{labels['text']}：{row['description']}",
            labels["rating"].format("" if rating is None else rating),
            f"{labels['hours']}：{hours}",
            f"{labels['closed']}：{row['closing_dates']}",
            labels["least"].format("" if least is None else least),
            labels["most"].format("" if most is None else most),
            labels["price"].format("0" if price is None else price),
            f"{labels['kind']}：{row['attraction_type']}",
        ]
    )


def _fields(row: Row, *same: str, **columns: str) -> dict[str, str]:
    """Columns that are shown under their own names, then renamed ones."""
    return {column: row[column] for column in same} | {shown: row[column] for shown, column in columns.items()}


def _list(column: str, row: Row) -> dict[str, list[str]]:
    return {column: row[column].split(";")} if row.get(column, "").strip() else {}


def _number(text: str) -> float | None:
    """A cell as a number; None if it is not a finite one (the tables are a user's files)."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _whole(text: str) -> int:
    return int(_number(text) or 0)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)
