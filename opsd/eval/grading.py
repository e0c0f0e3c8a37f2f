"""Grades answers: math answers with math-verify, simple formats by their ending, or with a user's function."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from opsd.eval.answer_forms import angles_differ, in_one_form, kinds_differ, units_differ
from opsd.eval.answer_text import signs_to_latex, to_latex
from opsd.eval.math_verify_process import MAX_ANSWER_CHARACTERS, MAX_GOLD_CHARACTERS, WORKER
from opsd.utils.errors import UserError, said
from opsd.utils.plugins import load_path

_GRADERS = "math, suffix or module:function"
_TAIL_CHARACTERS = 2000
_MAX_BOXES = 50
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Text between boxes that together are one answer: "\boxed{1} \quad\text{and}\quad y = \boxed{2}".
_MAX_JOINT_CHARACTERS = 60
_JOINT = re.compile(
    r"(?:[\s$,;]|and|or|\\[()\[\],;:! ]|\\q?quad|\\text\{[^{}]*\}|[A-Za-z](?:_\{?\w+\}?)?\s*=)*", re.IGNORECASE
)
_JOINT_WORD = re.compile(r"[,;]|and|or", re.IGNORECASE)
_ANSWER_LINE = re.compile(r"(?im)^[ \t*#>]*(?:final\s+)?answer[ \t*]*:[\s*]*(\S.*)$")
# A gold answer with such a mark is a text that contains the answer, not the answer itself.
_HOLDS_MATH = re.compile(r"(?<!\\)\$|\\boxed")
_MATH = re.compile(r"\$[^$\n]{1,500}\$")
_GROUP = re.compile(r"[(\[][^()\[\]$\n]{1,60},[^()\[\]$\n]{1,60}[)\]]")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_HEDGE = re.compile(r"\b(?:or|and|not|nor|but)\b|[\\^_=<>|()\[\]{}+*:;/]", re.IGNORECASE)
_BASE = re.compile(r"-?[0-9A-Za-z.,\s]+_\{?(\d{1,2})\}?")
_PRICE = re.compile(r"\$\s*[\d.][^$]*")
_INTEGER = re.compile(r"[+-]?\d{1,300}", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+", re.ASCII)


@dataclass(frozen=True)
class Grader:
    """Grades responses and names the answer that each votes for in majority voting.

    grade(response, gold): whether the response's answer is the gold answer. answer(response, gold): the response's
    answer in a form that equal answers share, or None if it has none; a grader without it has no vote.
    """

    grade: Callable[[str, str], bool]
    answer: Callable[[str, str], str | None] | None = None


def grade(response: str, gold: str) -> bool:
    """Whether the response's final answer equals `gold` as mathematics.

    The answer is the last balanced \\boxed{…} after any </think> (or several, if they are joined by commas or
    "and"), else the last "Answer: …" line, else what math-verify finds in the last _TAIL_CHARACTERS. Integers compare
    as integers ("025" is 25). Never raises for any input (only RuntimeError if math-verify itself cannot be
    started); an answer on which math-verify exceeds its time limit is wrong. Works in any thread or process:
    symbolic work runs in a separate process, which is restarted when it hangs or dies.
    """
    if not isinstance(response, str) or not isinstance(gold, str):
        return False
    text = _behind_thoughts(response)
    boxed, line = _boxed_answer(text), _answer_line(text)
    answer = boxed if boxed is not None else line
    if answer is None:
        return _in_text(text[-_TAIL_CHARACTERS:], gold)
    ours, theirs = _plain(answer), _plain(gold)
    if ours == theirs:
        return bool(ours)
    if _INTEGER.fullmatch(ours) and _INTEGER.fullmatch(theirs):
        return int(ours) == int(theirs)
    return _equal(answer, gold) if boxed is not None else _line_equal(answer, gold)


def _equal(answer: str, gold: str) -> bool:
    """Whether a bare answer equals the gold answer."""
    if len(answer) > MAX_ANSWER_CHARACTERS or len(gold) > MAX_GOLD_CHARACTERS:
        return False
    ours, theirs = to_latex(_unwrapped(answer)), _gold_latex(gold)
    if not _HOLDS_MATH.search(theirs):
        if units_differ(ours, theirs) or kinds_differ(ours, theirs) or angles_differ(ours, theirs):
            return False
        ours, theirs = in_one_form(ours, theirs)
    # math-verify ignores bases: 23_5 would equal 23_7.
    bases = [base[1] for text in (ours, theirs) if (base := _BASE.fullmatch(text.strip()))]
    if len(set(bases)) > 1:
        return False
    return WORKER.equal(ours, theirs)


def _line_equal(line: str, gold: str) -> bool:
    """The same for an "Answer:" line: a bare answer, or a sentence that contains one."""
    parts = _MATH.findall(line)
    around = _MATH.sub(" ", line)
    if len(parts) == 1 and not re.search(r"\d", around) and not _HEDGE.search(around):
        return _equal(parts[0].strip("$"), gold)
    # A single number among words is the answer; one of several, or one in a formula, is not.
    one_number = len(_NUMBER.findall(line)) == 1 and not _HEDGE.search(line)
    if units_differ(to_latex(_unwrapped(line)), _gold_latex(gold)):
        return False
    return _equal(line, gold) or ((bool(parts) or one_number) and _in_text(line, gold))


def _in_text(text: str, gold: str) -> bool:
    """Whether the answer that math-verify finds in a text equals the gold answer."""
    if len(gold) > MAX_GOLD_CHARACTERS:
        return False
    text = _MATH.sub(lambda part: to_latex(part[0]), signs_to_latex(text))
    if not re.search(r"\$|\\[(\[]", text):
        # The answer is the whole bracket, not a number in it.
        text = _GROUP.sub(r"$\g<0>$", text)
    return WORKER.equal(text[-MAX_ANSWER_CHARACTERS:], _gold_latex(gold), boxed=False)


def _gold_latex(gold: str) -> str:
    gold = _unwrapped(gold)
    return signs_to_latex(gold) if _HOLDS_MATH.search(gold) else to_latex(gold)


def _unwrapped(text: str) -> str:
    """The text without a final full stop and enclosing dollar signs; the dollar sign of a price becomes LaTeX's."""
    text = text.strip()
    text = text if text.endswith("...") else text.removesuffix(".")
    if _PRICE.fullmatch(text):
        return "\\" + text
    inner = text.removeprefix("$").removesuffix("$")
    return text if "$" in inner else inner


def extract_answer(response: str) -> str | None:
    """The final answer's text, or None: the last balanced box, else the last "Answer:" line; thinking is ignored.

    Boxes joined by commas or "and" are one answer: "\\boxed{1} and \\boxed{2}" is "1, 2".
    """
    text = _behind_thoughts(response)
    boxed = _boxed_answer(text)
    return boxed if boxed is not None else _answer_line(text)


def _behind_thoughts(response: str) -> str:
    return response.rsplit("</think>", 1)[-1]


def _boxed_answer(text: str) -> str | None:
    """The content of the last balanced box, with that of the boxes joined to it."""
    answers: list[str] = []
    first = None
    for match in reversed(list(_BOX.finditer(text))[-_MAX_BOXES:]):
        end = _closing_brace(text, match.end())
        if end is not None and (first is None or _joined(text[end + 1 : first])):
            answers.append(text[match.end() : end].strip())
            first = match.start()
        elif first is not None:
            break
    return ", ".join(reversed(dict.fromkeys(answers))) if answers else None


def _joined(between: str) -> bool:
    """Whether the text between two boxes makes them one answer."""
    if len(between) > _MAX_JOINT_CHARACTERS or not _JOINT_WORD.search(between):
        return False
    return _JOINT.fullmatch(between) is not None


def _answer_line(text: str) -> str | None:
    """The text after the last "Answer:" at the start of a line."""
    lines = _ANSWER_LINE.findall(text)
    answer = lines[-1].strip().rstrip("*").rstrip() if lines else ""
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARACTERS else None


def _closing_brace(text: str, start: int) -> int | None:
    """The index of the brace that closes the one before `start`; \\{ and \\} are signs, not braces."""
    depth, place, stop = 1, start, min(len(text), start + MAX_ANSWER_CHARACTERS)
    while place < stop:
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
        place += 2 if text[place] == "\\" else 1
    return None


def _plain(answer: str) -> str:
    text = answer.strip().strip("$").strip().removesuffix(".")
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _voted(response: str, gold: str) -> str | None:
    """The extracted answer's text without blanks; integers without leading zeros."""
    found = extract_answer(response)
    if found is None:
        return None
    text = re.sub(r"\s+", "", _plain(found))
    return str(int(text)) if _INTEGER.fullmatch(text) else text


def _ends_with(response: str, gold: str) -> bool:
    """Whether the response ends with `gold`; an empty gold is never matched."""
    return bool(gold) and response.endswith(gold)


def _ending(response: str, gold: str) -> str | None:
    """The response's last characters, as many as the gold answer has."""
    return response[-len(gold) :] if gold and len(response) >= len(gold) else None


# Mathematical equality of the last boxed or final answer (math-verify); the right ending, e.g. "…;A24".
MATH, SUFFIX = Grader(grade, _voted), Grader(_ends_with, _ending)


def load_grader(name: str, flag: str = "--eval.grader") -> Grader:
    """ "math", "suffix", or "module:function", which has no vote. flag: the option that named it.

    Raises UserError for anything else.
    """
    if name in ("math", "suffix"):
        return MATH if name == "math" else SUFFIX
    if ":" not in name:
        raise UserError(f"{flag} {name!r} is unknown; give {_GRADERS}")
    function = load_path(name, flag, _GRADERS)
    with said(f"{flag} {name!r} is not a function(response, gold)", f"give {_GRADERS}", TypeError, ValueError):
        inspect.signature(function).bind("response", "gold")
    return Grader(lambda response, gold: bool(function(response, gold)))
