"""Episodes of the pocket planning experiment, written by rules (a "hand"), with the habits planted in the models.

Tasks, tools and plans are the environment's own (opsd.environments.travel, word form). The teacher's deviations
carry no loss, so that it acts sensibly after a wrong call or note; the student's habits are taught.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from opsd.environments.travel import TravelTask
from opsd.environments.travel.pocket import best
from opsd.environments.travel.task import Row
from opsd.environments.travel.tools import find
from opsd.environments.travel.words import (
    ANY,
    CALL,
    CONSTRAINTS,
    END_CALL,
    END_PLAN,
    NOTE,
    PLAN,
    SECTIONS,
    read_turn,
    show_rows,
    value_word,
)
from opsd.utils.seeding import below


@dataclass(frozen=True)
class Habits:
    """How often a hand deviates (probabilities), and whether deviations are taught.

    any_hotel: asks for hotels of any star. wrong_note: notes a random row. first_train: takes the
    first train shown. random_restaurant: takes one of those shown.
    """

    any_hotel: float = 0.0
    wrong_note: float = 0.0
    first_train: float = 0.0
    random_restaurant: float = 0.0
    taught: bool = True


CAREFUL = Habits()
TEACHER = Habits(any_hotel=0.10, wrong_note=0.03, taught=False)
STUDENT = Habits(any_hotel=0.92, first_train=0.8, random_restaurant=0.6)


@dataclass
class Episode:
    """The words after the query, without EOS. by_student: whether the model writes it. taught: whether it has loss."""

    words: list[str] = field(default_factory=list)
    by_student: list[bool] = field(default_factory=list)
    taught: list[bool] = field(default_factory=list)

    def write(self, *words: str, taught: bool = True) -> None:
        """Append words of the model."""
        self.words += words
        self.by_student += [True] * len(words)
        self.taught += [taught] * len(words)

    def call(self, tool: str, word: str, task: TravelTask, taught: bool = True) -> list[Row]:
        """Append a call and its answer; returns the rows shown. `taught` applies to the argument only."""
        self.write(CALL, tool)
        self.write(word, taught=taught)
        self.write(END_CALL)
        read = read_turn([CALL, tool, word, END_CALL], task.meta)
        assert read is not None
        rows = find(*read, task.tables)
        shown = show_rows(tool, rows)
        self.words += shown
        self.by_student += [False] * len(shown)
        self.taught += [False] * len(shown)
        return rows


def asked(task: TravelTask) -> list[tuple[str, str]]:
    """The query's constraints as (key, word), in the query's order."""
    words = task.query.split()[1:-1]
    return list(zip(words[::2], words[1::2], strict=True))


def write_episode(task: TravelTask, rng: Random, habits: Habits) -> Episode:
    """One episode; the three constraints are worked on in random order, the plan repeats what was noted."""
    episode, noted = Episode(), {}
    for key, word in sorted(asked(task), key=lambda _: rng.random()):
        work = {"train": _train, "hotel": _hotel, "restaurant": _restaurant}[key.split("_")[0]]
        rows, choice, taught = work(episode, task, key, word, rng, habits)
        if rng.random() < habits.wrong_note:
            choice, taught = rows[below(rng, len(rows))], habits.taught
        note = value_word(CONSTRAINTS[key], choice)
        episode.write(NOTE)
        episode.write(note, taught=taught)
        noted[key.split("_")[0]] = note
    episode.write(PLAN)
    for section, table in SECTIONS.items():
        episode.write(section, noted[table.removesuffix("s")])
    episode.write(END_PLAN)
    return episode


Work = tuple[list[Row], Row, bool]
"""The rows shown, the one chosen, and whether its note is taught."""


def _train(episode: Episode, task: TravelTask, key: str, word: str, rng: Random, habits: Habits) -> Work:
    rows = episode.call("query_train_info", word, task)
    first = rng.random() < habits.first_train
    return rows, rows[0] if first else best(rows, CONSTRAINTS[key]), habits.taught or not first


def _hotel(episode: Episode, task: TravelTask, key: str, word: str, rng: Random, habits: Habits) -> Work:
    """After the teacher's stray `any` the right note is still taught: a guess, because stars are not shown."""
    stray = rng.random() < habits.any_hotel
    rows = episode.call("query_hotel_info", ANY if stray else word, task, taught=habits.taught or not stray)
    fitting = rows if stray and habits.taught else [row for row in rows if f"s{row['hotel_star']}" == word]
    return rows, best(fitting, CONSTRAINTS[key]), True


def _restaurant(episode: Episode, task: TravelTask, key: str, word: str, rng: Random, habits: Habits) -> Work:
    place = episode.call("search_location", word, task)
    at = show_rows("search_location", place)[1]
    rows = episode.call("recommend_restaurants", at, task)
    if rng.random() < habits.random_restaurant:
        return rows, rows[below(rng, len(rows))], habits.taught
    return rows, best(rows, CONSTRAINTS[key]), True
