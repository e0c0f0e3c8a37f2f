"""Brings two LaTeX answers into the same form: intervals for inequalities, radians for degrees, if they differ."""

from __future__ import annotations

import itertools
import re

from opsd.eval.answer_text import closing

_LAYOUT = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ]|\\q?quad|\$|~")

_NAMES = {
    "<": "<", ">": ">", r"\lt": "<", r"\gt": ">", "<=": "≤", ">=": "≥", r"\le": "≤", r"\ge": "≥", r"\leq": "≤",
    r"\geq": "≥", r"\leqslant": "≤", r"\geqslant": "≥", r"\leqq": "≤", r"\geqq": "≥", r"\ne": "≠", r"\neq": "≠",
    "!=": "≠",
}  # fmt: skip
_RELATION = re.compile(r"\\(?:leqslant|leqq|leq|le|geqslant|geqq|geq|ge|lt|gt|neq|ne)(?![a-zA-Z])|[<>!]=|[<>]")
_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "≠": "≠"}
_OR = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|\\(?:lor|vee|cup)(?![a-zA-Z])|(?<![a-zA-Z\\])or(?![a-zA-Z])")
_AND = re.compile(r"\\(?:text|mbox)\s*\{\s*and\s*\}|\\(?:land|wedge)(?![a-zA-Z])|(?<![a-zA-Z\\])and(?![a-zA-Z])")
_BUILDER = re.compile(
    r"\\?\{\s*(\S{1,20})(?:\s*\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid(?![a-zA-Z])|\\vert|:|\|)(.*?)\\?\}"
)
_VARIABLE = re.compile(r"(?:[a-zA-Z]|\\(?!pi|infty)[a-z]{2,8})(?:_\{?\w{1,8}\}?)?")
_CONSTANT_COMMAND = re.compile(r"\\(?:[dt]?frac|sqrt|pi|infty|cdot|times|log|ln)(?![a-zA-Z])")
_CONSTANT = re.compile(r"[\d\s.+\-*/^(){}\[\]!e]+")
_SET = re.compile(
    r"(?:(?:[a-zA-Z]|\\[a-z]+)\s*\\in\b)?\s*(?:\\left\s*)?[(\[\]]|.*\\(?:cup|infty|mathbb|setminus|backslash)"
)

_DEGREE = re.compile(r"\s*\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})")
_TURN = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])|\\pi(?![a-zA-Z])")
_UNITS = (
    "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre", "in inch inche",
    "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram", "kg kilogram", "oz ounce", "lb pound",
    "ml milliliter millilitre", "l liter litre", "ms millisecond", "s sec second", "min minute", "h hr hour", "day",
    "week", "month", "year", "cent", "dollar", "unit", "am", "pm", "n newton", "j joule",
)  # fmt: skip
_UNIT_OF = {name: names.split()[0] for names in _UNITS for name in names.split()}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_TEXT = r"\\(?:text|textrm|textbf|mathrm|mbox|operatorname)\s*\{[^{}]*\}"
_UNIT = re.compile(rf"(?<=[\d.)\]}}])\s*(?:{_TEXT}|[a-zA-Z])(?:{_TEXT}|[a-zA-Z/. ]|\^\s*\{{?\s*\d\s*\}}?)*$")
# A price with a leading dollar sign: $5.
_PRICE = re.compile(r"\s*[+-]?\s*\\\$\s*[\d.]")
# ∠ABC or ∠{ABC}; a segment AB with a bar over it.
_ANGLE = re.compile(r"\\angle\s*(?:\{\s*)?([A-Z])\s*([A-Z])\s*([A-Z])(?:\s*\})?")
_SEGMENT = re.compile(r"\\overline\s*\{\s*([A-Z])\s*([A-Z])\s*\}")
_COMMAND_AND_BRACES = r"\\[a-z]+\s*(?=\{)|[{}.]"
_UNIT_WORD = re.compile(r"([a-z]+)((?:\s*\^?\s*\d)?)")
_ATOM = re.compile(r"(?:\d[\d.]*|\\[a-zA-Z]+|[a-zA-Z])$")


def in_one_form(answer: str, gold: str) -> tuple[str, str]:
    """Both answers in forms that can be compared; unchanged if they already can be.

    Inequalities become intervals if the other answer is a set, or an inequality in the same variable. Degrees become
    radians if one answer has degrees and one has a trigonometric function or π; otherwise math-verify ignores the
    degree sign. The ends of a segment are put in alphabetical order.
    """
    answer, gold = (_SEGMENT.sub(_in_order, text) for text in (answer, gold))
    if _DEGREE.search(answer + " " + gold) and _TURN.search(answer + " " + gold):
        answer, gold = _in_radians(answer), _in_radians(gold)
    ours, theirs = _solutions(answer), _solutions(gold)
    if ours is not None and theirs is not None:
        return (ours[1], theirs[1]) if ours[0] == theirs[0] else (answer, gold)
    if ours is not None and _SET.match(gold.strip()):
        return ours[1], gold
    if theirs is not None and _SET.match(answer.strip()):
        return answer, theirs[1]
    return answer, gold


def units_differ(answer: str, gold: str) -> bool:
    """Whether both have known units, and different ones: cm³ and cm², km and m, $5 and 5 cents.

    If either has no unit or an unknown one, only the numbers count, as in math-verify, which ignores units. Units
    are not converted: 5 cents are not $0.05 here.
    """
    ours, theirs = _units(answer), _units(gold)
    return bool(ours and theirs) and ours != theirs


def kinds_differ(answer: str, gold: str) -> bool:
    """Whether one is a set in braces and the other a pair, tuple or interval: \\{1,2\\} and (1,2).

    math-verify says that it does not compare these, but reads (1,2) as an interval and then does. A bare list 1,2 may
    be either.
    """
    return {_kind(answer), _kind(gold)} == {"set", "tuple"}


def angles_differ(answer: str, gold: str) -> bool:
    """Whether both are angles given by points, ∠ABC, and different: math-verify reads the letters as a product.

    ABC without the sign stays a product and equals CBA: nothing marks it as an angle.
    """
    named = [_ANGLE.fullmatch(_LAYOUT.sub("", text).strip()) for text in (answer, gold)]
    if None in named:
        return False
    ours, theirs = ((found[2], {found[1], found[3]}) for found in named if found is not None)
    return ours != theirs


def _kind(text: str) -> str | None:
    """ "set" or "tuple" of several elements within one pair of brackets; None for anything else."""
    text = _LAYOUT.sub("", text).strip()
    if "," not in text or text[-1] not in ")]}":
        return None
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set" if text.count(r"\{") == 1 else None
    depths = list(itertools.accumulate((sign in "([") - (sign in ")]") for sign in text))
    return "tuple" if depths[0] and depths.index(0) == len(text) - 1 else None


def _in_order(segment: re.Match[str]) -> str:
    return rf"\overline{{{''.join(sorted(segment.groups()))}}}"


def _units(text: str) -> list[tuple[str, int]]:
    """The name and power of each unit after a number ("m/s" has two), or of $5; [] if there is none or one is
    unknown.
    """
    found = _UNIT.search(_LAYOUT.sub(" ", text).strip())
    if found is None:
        return [("dollar", 1)] if _PRICE.match(text) else []
    words = re.sub(_COMMAND_AND_BRACES, " ", found[0]).lower()
    units = [_unit(part) for part in re.split(r"/|(?<![a-z])per(?![a-z])", words)]
    return [unit for unit in units if unit is not None] if None not in units else []


def _unit(words: str) -> tuple[str, int] | None:
    """ "square inches" or "in 2" as ("in", 2); None for anything else."""
    power, names = 1, []
    for word, raised in _UNIT_WORD.findall(words):
        if word in _POWERS:
            power = _POWERS[word]
        else:
            names.append(_UNIT_OF.get(word) or _UNIT_OF.get(word.removesuffix("s")))
            power = int(raised.strip(" ^")) if raised else power
    return (names[0], power) if len(names) == 1 and names[0] is not None else None


def _solutions(text: str) -> tuple[str, str] | None:
    """The variable of an inequality (or several, joined by "or") and its solutions as intervals; None otherwise."""
    text = _LAYOUT.sub(" ", text).strip()
    if not _RELATION.search(text):
        return None
    if (builder := _BUILDER.fullmatch(text)) is not None:
        text = builder[2]
    found = [interval for clause in _OR.split(text) if (interval := _interval(clause)) is not None]
    variables = {variable for variable, _ in found}
    if len(found) < len(_OR.split(text)) or len(variables) != 1:
        return None
    return variables.pop(), r" \cup ".join(interval for _, interval in found)


def _interval(clause: str) -> tuple[str, str] | None:
    """The variable and the solutions of a < x, of a < x ≤ b, or of two bounds joined by "and"; None otherwise."""
    parts = [_bounds(part) for part in _AND.split(clause)]
    bounds = [bound for part in parts for bound in part]
    if not all(parts) or len({variable for variable, _, _ in bounds}) != 1:
        return None
    variable, relation, limit = bounds[0]
    if relation == "≠":
        return (variable, rf"(-\infty,{limit}) \cup ({limit},\infty)") if len(bounds) == 1 else None
    lower = [bound for bound in bounds if bound[1] in ">≥"] or [(variable, ">", r"-\infty")]
    upper = [bound for bound in bounds if bound[1] in "<≤"] or [(variable, "<", r"\infty")]
    if len(lower) > 1 or len(upper) > 1 or any(sign == "≠" for _, sign, _ in bounds):
        return None
    (_, left, start), (_, right, end) = *lower, *upper
    opens = "[" if left == "≥" and "infty" not in start else "("
    closes = "]" if right == "≤" and "infty" not in end else ")"
    return variable, f"{opens}{start},{end}{closes}"


def _bounds(part: str) -> list[tuple[str, str, str]]:
    """(variable, relation, limit) of x < b, a < x, or both of a < x < b; [] for anything else."""
    signs = [_NAMES[sign] for sign in _RELATION.findall(part)]
    sides = [side.strip() for side in _RELATION.split(part)]
    if len(signs) == 1 and _is_constant(sides[0]):
        sides, signs = sides[::-1], [_FLIPPED[signs[0]]]
    if len(signs) == 1 and _VARIABLE.fullmatch(sides[0]) and _is_constant(sides[1]):
        return [(sides[0], signs[0], sides[1])]
    same_way = len(signs) == 2 and (set(signs) <= set("<≤") or set(signs) <= set(">≥"))
    if same_way and _VARIABLE.fullmatch(sides[1]) and _is_constant(sides[0]) and _is_constant(sides[2]):
        return [(sides[1], _FLIPPED[signs[0]], sides[0]), (sides[1], signs[1], sides[2])]
    return []


def _is_constant(text: str) -> bool:
    return _CONSTANT.fullmatch(_CONSTANT_COMMAND.sub("1", text)) is not None


def _in_radians(text: str) -> str:
    """The text with each degree sign replaced: what precedes it is multiplied by π/180."""
    text = _LAYOUT.sub(" ", text)
    done, place = "", 0
    for sign in _DEGREE.finditer(text):
        done += text[place : sign.start()]
        start = _atom_start(done)
        done = rf"{done[:start]}({done[start:]}\cdot\frac{{\pi}}{{180}})"
        place = sign.end()
    return done + text[place:]


def _atom_start(text: str) -> int:
    """Where the last number, letter or bracket of `text` starts; a command starts before its brackets."""
    text = text.rstrip()
    start = len(text)
    while start and text[start - 1] in ")}]" and (opened := _opening(text, start - 1)) is not None:
        start = opened
        if text[start] == "(":
            return start
    if start == len(text):
        atom = _ATOM.search(text)
        return start if atom is None else atom.start()
    command = re.search(r"\\[a-zA-Z]+$", text[:start])
    return start if command is None else command.start()


def _opening(text: str, end: int) -> int | None:
    """The index of the bracket that the one at `end` closes."""
    mirrored = text[: end + 1][::-1].translate(str.maketrans("(){}[]", ")(}{]["))
    place = closing(mirrored, 0)
    return None if place is None else end - place
