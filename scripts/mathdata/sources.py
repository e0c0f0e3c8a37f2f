"""Sources of rows: a .jsonl or .parquet file, or the hub; and the columns that hold problem and answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from opsd.data.prompts import read_records
from opsd.utils.errors import UserError, first_line

ROWS_AT_ONCE = 8192
"""The hub's DAPO-Math-17k has 1.79 million rows: they are read in batches."""

# Columns of problem and answer, in the order in which they are tried; case is ignored.
COLUMNS = [
    ("problem", "answer"),
    ("question", "answer"),
    ("prompt", "reward_model.ground_truth"),
    ("prompt", "answer"),
]


@dataclass(frozen=True)
class KnownSet:
    """A public set. hub: dataset, configuration (or None) and split. problems: expected number (None: not
    fixed). answers: kind of its answers, "text" | "aime" | "gsm8k" | "dapo" (see `read_answer`)."""

    hub: tuple[str, str | None, str]
    problems: int | None = None
    answers: str = "text"


KNOWN = {
    "dapo": KnownSet(("BytedTsinghua-SIA/DAPO-Math-17k", None, "train"), answers="dapo"),
    "math500": KnownSet(("HuggingFaceH4/MATH-500", None, "test"), 500),
    "aime24": KnownSet(("HuggingFaceH4/aime_2024", None, "train"), 30, "aime"),
    "aime25": KnownSet(("math-ai/aime25", None, "test"), 30, "aime"),
    "gsm8k": KnownSet(("openai/gsm8k", "main", "test"), 1319, "gsm8k"),
}


@dataclass(frozen=True)
class Source:
    """A named set and its place: "hub", "hub:OWNER/NAME[:CONFIG]:SPLIT", or a file. columns: problem and answer."""

    name: str
    place: str
    columns: tuple[str, str] | None = None

    @property
    def known(self) -> KnownSet | None:
        """The entry in KNOWN of a public set; None for the user's own set."""
        return KNOWN.get(self.name)

    def rows(self) -> Iterator[Row]:
        """All rows in the source's order. Raises UserError for a place or a column that does not exist."""
        columns = self.columns
        for number, record in enumerate(self._records(), start=1):
            where = f"{self.name} ({self.place}) row {number}"
            columns = columns or _guess_columns(record, self.name, where)
            problem, answer = (_lookup(record, column, where, self.name) for column in columns)
            yield Row(where, _problem_text(problem, where), read_answer(answer, self._answers, where))

    @property
    def _answers(self) -> str:
        return self.known.answers if self.known else "text"

    def _records(self) -> Iterable[dict[str, Any]]:
        if self.place != "hub" and not self.place.startswith("hub:"):
            return _file_records(Path(self.place))
        return _hub_records(*self._hub_address(), self.name)

    def _hub_address(self) -> tuple[str, str | None, str]:
        if self.place != "hub":
            parts = self.place.split(":")[1:]
            if len(parts) not in (2, 3) or not all(parts):
                raise UserError(
                    f"--sets {self.name}={self.place}: give hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT"
                )
            return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]
        if self.known is None:
            raise UserError(
                f"--sets {self.name}=hub: the dataset is known for {', '.join(KNOWN)} only; "
                f"give {self.name}=hub:OWNER/NAME:SPLIT"
            )
        return self.known.hub


@dataclass(frozen=True)
class Row:
    """One row of a source. where: for messages. problem: raw text, may have instructions. answer: None if blank."""

    where: str
    problem: str
    answer: str | None = field(default=None)


def read_answer(value: Any, kind: str, where: str) -> str | None:
    """A gold answer as text, None if it is blank. Raises UserError for a value that is not an answer.

    kind "gsm8k": the text after the last ####, without thousands commas. "aime": an integer from 0 to 999, written
    without leading zeros (graders that compare text would take "025" and "25" for different). Else the text as it is.
    """
    # In some tables NaN is an empty cell of a column of numbers.
    if value is None or value != value:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: its answer is a {type(value).__name__}; give a column of texts or numbers")
    text = str(int(value)) if isinstance(value, float) and value % 1 == 0 else str(value).strip()
    text = _whole(text, where)
    if kind == "gsm8k":
        _, mark, last = text.rpartition("####")
        if not mark:
            raise UserError(f"{where}: its answer has no '####'; give the original GSM8K, or a set of another name")
        return last.strip().replace(",", "") or None
    if kind == "aime" and text:
        if not re.fullmatch(r"\d{1,3}", text, re.ASCII):
            raise UserError(f"{where}: its answer is {text[:40]!r}; AIME answers are integers from 0 to 999")
        return str(int(text))
    return text or None


def _file_records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix != ".parquet" or not path.is_file():
        yield from read_records(path)
        return
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as parquet ({first_line(error)}); give a complete file") from error


def _hub_records(dataset: str, config: str | None, split: str, name: str) -> Iterable[dict[str, Any]]:
    """Rows of a hub dataset by the package `datasets`, which comes with the extra `test` only."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"--sets {name}: the hub needs the package datasets; pip install datasets, or give a file: {name}=FILE"
        ) from error
    try:
        rows: Any = load_dataset(dataset, config, split=split)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--sets {name}: {dataset} cannot be loaded ({first_line(error)}); give a file: {name}=FILE"
        ) from error
    return rows


def _guess_columns(record: dict[str, Any], name: str, where: str) -> tuple[str, str]:
    for problem, answer in COLUMNS:
        if _find(record, problem) is not None and _find(record, answer) is not None:
            return problem, answer
    raise UserError(
        f"{where} has the columns {', '.join(record)}; say which ones hold problem and answer: "
        f"--columns {name}=PROBLEM,ANSWER"
    )


def _lookup(record: dict[str, Any], column: str, where: str, name: str) -> Any:
    found = _find(record, column)
    if found is None:
        raise UserError(
            f"{where} has no column {column!r}, it has: {', '.join(record)}; give --columns {name}=PROBLEM,ANSWER"
        )
    return found[0]


def _find(record: dict[str, Any], column: str) -> tuple[Any] | None:
    """The value of a column, or of a dotted path into structs, ignoring case; None if it does not exist."""
    value: Any = record
    for key in [column] if column in record else column.split("."):
        if not isinstance(value, dict):
            return None
        same = [name for name in value if name.lower() == key.lower()]
        if not same:
            return None
        value = value[same[0]]
    return (value,)


def _problem_text(value: Any, where: str) -> str:
    """A text, or the one user message of a list of chat messages; blank for an empty cell."""
    if value is None or isinstance(value, str):
        return _whole(value or "", where)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        said = [message.get("content") for message in value if message.get("role") == "user"]
        if len(said) == 1 and isinstance(said[0], str):
            return _whole(said[0], where)
    raise UserError(f"{where}: its problem is neither a text nor a list of messages with one from the user")


def _whole(text: str, where: str) -> str:
    """The text, if it can be written to a file: JSON may hold lone surrogates (halves of characters)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character ({error.reason}); fix the text") from error
    return text
