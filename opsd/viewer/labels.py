"""What the values of a record's label columns mean. Names and colours come with the telemetry that wrote them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import pandas as pd

from opsd.selection import TokenStats, known_options, load_telemetry

# Integer columns of a record that are not labels.
_NUMBERS = {"step", "position", "token_id", *(f.name.removesuffix("_N") for f in dataclasses.fields(TokenStats))}
# For the values of a column that no installed telemetry knows.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")


@dataclass(frozen=True)
class Label:
    """A value of a label column. what: its meaning, in a few words. faint: coloured lightly, as most tokens have it.

    clearest: statistics that are high (1) or low (-1) in the clearest cases; examples: how many of them are shown.
    """

    value: int
    name: str
    what: str
    colour: str
    faint: bool = False
    clearest: dict[str, int] = field(default_factory=dict)
    examples: int = 0


Labels = dict[str, tuple[Label, ...]]


@runtime_checkable
class NamesLabels(Protocol):
    """Telemetry that says what its columns (see TokenTelemetry's label_tokens) hold.

    It may have `labels_at(splits) -> Labels`: the labels of a record that was split at `splits`, in nats by axis.
    """

    labels: Labels


def labels_of(table: pd.DataFrame, options: dict[str, str], splits: Callable[[str], dict[str, float]]) -> Labels:
    """The label columns of a record, by name. Values that no installed telemetry knows are named by their numbers.

    options: the run's telemetry options. splits: returns where a column's axes were split, in nats by axis.
    """
    known: Labels = {}
    for telemetry in load_telemetry(known_options(options)):
        if isinstance(telemetry, NamesLabels):
            at = getattr(telemetry, "labels_at", None)
            for column, labels in telemetry.labels.items():
                known[column] = labels if at is None else at(splits(column))[column]
    columns = [name for name in map(str, table) if pd.api.types.is_integer_dtype(table[name]) and name not in _NUMBERS]
    return {name: known.get(name) or _numbered(name, sorted(set(table[name].tolist()))) for name in columns}


def _numbered(column: str, values: list[int]) -> tuple[Label, ...]:
    colours = itertools.cycle(_COLOURS)
    return tuple(Label(value, f"{column} {value}", "", colour) for value, colour in zip(values, colours, strict=False))
