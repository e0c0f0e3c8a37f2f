"""Faults put into real runs. Each test says in its marker what was done and what must happen: a row of the table.

`make faults` runs all of them and writes the table into docs/reliability.md (scripts/faults.py), from the outcomes.
"""

from collections.abc import Callable

import pytest

Seen = Callable[[str], None]


@pytest.fixture(autouse=True)
def _row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Hand the marker `fault(what was done, what must happen)` on to the table's maker."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None and len(marker.args) == 2, "mark it: @pytest.mark.fault('what was done', 'what must be')"
    done, must = marker.args
    record_property("done", done)
    record_property("must", must)
    record_property("line", request.node.location[1])


@pytest.fixture
def seen(record_property: Callable[[str, object], None]) -> Seen:
    """What a test measured, in a few words, for the table's last column."""
    return lambda text: record_property("seen", text)
