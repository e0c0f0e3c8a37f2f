"""Rows to problems: copies merged, doubtful answers dropped, and every row accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mathdata.problems import Problem, problem_key, strip_instruction, without_spaces
from mathdata.sources import Row

# Integers above this were stored as floats at some point: their last digits are zeros or wrong.
LARGEST_EXACT = 2**53

Counts = dict[str, int]


def collect(rows: Iterable[Row], doubtful: bool) -> tuple[list[Problem], Counts]:
    """Problems in the order in which they first appear, and counts of all rows by outcome.

    Rows are copies of one problem if their texts have the same `problem_key`; the copies' alphabetically first text is
    kept, so that the order of rows does not matter. Dropped: rows without text or
    answer, problems whose copies disagree about the answer and, if `doubtful`, problems with the answer −1 or one
    beyond 2^53. doubtful: the set is known to have doubtful labels (see docs/data.md).

    Counts: "rows" − "blank" − "exact_copies" − "spacing_copies" − "notation_copies" − "conflicting" − "minus_one" −
    "rounded" = "problems"; "instructions": rows that had an answer instruction.
    Raises UserError for an unknown instruction.
    """
    counts: Counts = dict.fromkeys(("rows", "instructions", "blank"), 0)
    answers_of_raw: dict[str, Counter[str]] = {}
    where_of_raw: dict[str, str] = {}
    for row in rows:
        counts["rows"] += 1
        if row.answer is None or not row.problem.strip():
            counts["blank"] += 1
            continue
        answers_of_raw.setdefault(row.problem, Counter())[row.answer] += 1
        where_of_raw.setdefault(row.problem, row.where)

    answers_of_text: dict[str, Counter[str]] = {}
    for raw, answers in answers_of_raw.items():
        text = strip_instruction(raw, where_of_raw[raw])
        counts["instructions"] += answers.total() * (text != raw.strip())
        if problem_key(text):
            answers_of_text.setdefault(text, Counter()).update(answers)
        else:
            counts["blank"] += answers.total()

    texts_of_key: dict[str, list[str]] = {}
    for text in answers_of_text:
        texts_of_key.setdefault(problem_key(text), []).append(text)
    counts["exact_copies"] = sum(answers.total() - 1 for answers in answers_of_text.values())
    unspaced = len({without_spaces(text) for text in answers_of_text})
    counts["spacing_copies"] = len(answers_of_text) - unspaced
    counts["notation_copies"] = unspaced - len(texts_of_key)
    return _judge(answers_of_text, texts_of_key, doubtful, counts), counts


def _judge(
    answers_of_text: dict[str, Counter[str]], texts_of_key: dict[str, list[str]], doubtful: bool, counts: Counts
) -> list[Problem]:
    """One problem per key, unless its answer is in doubt; completes `counts`."""
    counts |= dict.fromkeys(("conflicting", "minus_one", "rounded"), 0)
    kept = []
    for key, texts in texts_of_key.items():
        answers = set().union(*(answers_of_text[text] for text in texts))
        answer = min(answers)
        if len(answers) > 1:
            counts["conflicting"] += 1
        elif doubtful and answer == "-1":
            counts["minus_one"] += 1
        elif doubtful and _beyond_float(answer):
            counts["rounded"] += 1
        else:
            kept.append(Problem(min(texts), key, answer))
    counts["problems"] = len(kept)
    return kept


def without(problems: list[Problem], taken: set[str]) -> list[Problem]:
    """The problems whose key is not in `taken`."""
    return [problem for problem in problems if problem.key not in taken]


def split(problems: list[Problem], held_out_fraction: float) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, each in the order of their hashes.

    A problem's side depends only on its key and the fraction: it stays if rows are added, removed or moved; copies of
    one problem are never on both sides. In hash order the first n problems are a random sample.
    """
    ordered = sorted(problems, key=lambda problem: problem.digest)
    return (
        [problem for problem in ordered if problem.place >= held_out_fraction],
        [problem for problem in ordered if problem.place < held_out_fraction],
    )


def _beyond_float(answer: str) -> bool:
    digits = answer.removeprefix("-")
    return digits.isdecimal() and int(digits) > LARGEST_EXACT
