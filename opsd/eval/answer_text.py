"""Turns answers as people write them into LaTeX for math-verify: signs, roots, mixed numbers, repeating decimals.

Text in, text out; anything that is not recognised is left as it is.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_SIGNS = {
    "−": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/",
    "⁄": "/", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ",
    "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}",
    "ℂ": r"\mathbb{C}", "°": r"^\circ ", "º": r"^\circ ", "…": r"\ldots ", "⋯": r"\ldots ", "⟨": r"\langle ",
    "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∠": r"\angle ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\u2061": "", "\u2062": "",
}  # fmt: skip
_RAISED: dict[str, str] = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_LOWERED: dict[str, str] = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙ", "0123456789+-=()n", strict=True))
_RAISED_RUN, _LOWERED_RUN = f"[{''.join(_RAISED)}]+", f"[{''.join(_LOWERED)}]+"
_SPLIT_FRACTION = re.compile(f"({_RAISED_RUN})⁄({_LOWERED_RUN})")
# A raised number before a root sign is the root's index, unless it is the power of what precedes it.
_ROOT = re.compile(rf"(?:(?<![\w)}}\]])({_RAISED_RUN}))?([√∛∜])\s*")
_NEAR = 500
_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}
_RADICAND = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]|\\[a-zA-Z]+(?:\[\d+\])?(?:\{[^{}]*\}){0,2}")
_WORD_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])(?<!text\{)(?<!mathrm\{)(?<!name\{)(sin|cos|tan|cot|sec|csc|log|ln|pi)(?![a-zA-Z])"
)

_BLANK = r"(?:\s|~|\\[ ,;:!]|\\quad)"
_MIXED = re.compile(
    rf"(?<![\w.,^_/])(?<!\d\s)(\d{{1,12}}){_BLANK}+(\d{{1,12}})\s*/\s*(\d{{1,12}})(?![\w.,]?\d|[/^_!a-zA-Z])"
)

_POINT = r"(?<![\d.,^_])(?P<whole>\d{0,30})\.(?P<first>\d{0,30})"
_END = r"(?![\d^_(])"
_OVER = r"\\(?:overline|overbar|bar|dot|widebar)\s*"
_DOTTED = r"\\dot\s*(?:\{\d\}|\d)"
_REPEATING = (
    re.compile(rf"{_POINT}{_BLANK}*{_OVER}(?:{{\s*(?P<unit>\d{{1,30}})\s*}}|(?P<digit>\d)){_END}"),
    re.compile(rf"{_POINT}(?P<unit>{_DOTTED}\d{{0,30}}{_DOTTED}){_END}"),
    # After other digits, brackets may be a product, except if the number is the whole answer.
    re.compile(rf"(?<![\d.,^_])(?P<whole>\d{{0,30}})\.(?P<first>)\((?P<unit>\d{{1,30}})\){_END}"),
    re.compile(r"^(?P<sign>\s*-?\s*)(?P<whole>\d{0,30})\.(?P<first>\d{1,30})\((?P<unit>\d{1,30})\)\s*$"),
)
_POWERS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGE = re.compile(rf"(?<=\d)\s*(\\text\s*\{{\s*)?({'|'.join(_POWERS)})(?![a-zA-Z])(?(1)\s*\}}|)")
# 1e-8 is a number in scientific notation; 2e-3 may be 2·e − 3.
_SCIENTIFIC = re.compile(r"^\s*(-?(?:\d+\.\d+|1)(?=[eE])|-?\d+(?=E|e[+-]?\d\d))[eE]\+?(-?\d{1,3})\s*$")
_GOES_ON = re.compile(r"(?<![\d.,^_])(\d{0,30})\.(\d{1,60})\s*(?:\.{3,}|\\(?:l|c)?dots[cbmio]?(?![a-zA-Z]))")
# Groups of three digits, which math-verify would multiply; groups with plain blanks only if they are the whole answer.
_GROUPED = re.compile(r"(?<![\d.,^_])\d{1,3}(?:(?:\\[,;: ]|~)\s*\d{3})+(?![\d/])")
_SPACED = re.compile(r"\s*[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?\s*")
# math-verify compares this many digits; fewer are too few to compare.
_ENOUGH_DIGITS = 6


def to_latex(text: str) -> str:
    r"""An answer's text in LaTeX: signs as commands, mixed numbers and repeating decimals as fractions.

    1\,000 becomes 1000.
    """
    return _repeating(_ungrouped(signs_to_latex(text)))


def signs_to_latex(text: str) -> str:
    """The text with Unicode signs, roots, powers and fractions as LaTeX commands, and mixed numbers as fractions.

    For any text, not only a bare answer.
    """
    text = re.sub("(?:\\d\u0305)+", lambda run: rf"\overline{{{run[0].replace(chr(0x305), '')}}}", text)
    text = re.sub("(\\d)\u0307", r"\\dot{\1}", text)
    text = _SPLIT_FRACTION.sub(lambda both: rf"\frac{{{_plain(both[1])}}}{{{_plain(both[2])}}}", text)
    text = _roots(text)
    text = re.sub(_RAISED_RUN, lambda run: f"^{{{_plain(run[0])}}}", text)
    text = re.sub(_LOWERED_RUN, lambda run: f"_{{{_plain(run[0])}}}", text)
    text = re.sub(r"(?<![\w)])–", "-", text)
    text = re.sub(r"\\degrees?(?![a-zA-Z])", r"^\\circ ", text)
    text = "".join(map(_sign, text)) if not text.isascii() else text
    return _MIXED.sub(_mixed, _WORD_FUNCTION.sub(r"\\\1 ", text))


def _ungrouped(text: str) -> str:
    """The text without the blanks between groups of three digits."""
    if _SPACED.fullmatch(text):
        return text.replace(" ", "")
    return _GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text)


def _plain(run: str) -> str:
    return "".join((_RAISED | _LOWERED)[sign] for sign in run)


def _sign(sign: str) -> str:
    """One character as LaTeX."""
    if sign.isascii() or sign in _SIGNS:
        return _SIGNS.get(sign, sign)
    kind, _, parts = unicodedata.decomposition(sign).partition(" ")
    name = unicodedata.name(sign, "")
    if kind == "<fraction>" and len(halves := unicodedata.normalize("NFKC", sign).split("⁄")) == 2 and halves[1]:
        return rf"\frac{{{halves[0]}}}{{{halves[1]}}}"
    if kind in {"<wide>", "<narrow>", "<font>"} and parts:
        return _sign(unicodedata.normalize("NFKC", sign)[0])
    if name.startswith("GREEK SMALL LETTER ") and name.count(" ") == 3:
        return "\\" + name.rpartition(" ")[2].lower().replace("lamda", "lambda") + " "
    return sign


def _roots(text: str) -> str:
    """The text with √, ∛ and ∜ as \\sqrt, innermost first; a sign without a radicand is kept."""
    for root in reversed(list(_ROOT.finditer(text))):
        behind = text[root.end() :]
        if behind.startswith("("):
            end = closing(behind, 0)
            radicand, end = (None, 0) if end is None else (behind[1:end], end + 1)
        elif behind.startswith("{"):
            radicand, end = "", 0
        else:
            found = _RADICAND.match(behind)
            radicand, end = (None, 0) if found is None else (found[0], found.end())
            if re.match(rf"\^|{_RAISED_RUN}", behind[end:]):
                radicand = None  # √x² is ambiguous: (√x)² or √(x²)
        if radicand is not None:
            index = f"[{_plain(root[1])}]" if root[1] else _INDEX[root[2]]
            body = f"{{{radicand}}}" if end else ""
            text = rf"{text[: root.start()]}\sqrt{index}{body}{behind[end:]}"
    return text


def closing(text: str, start: int) -> int | None:
    """The index of the bracket that closes the one at `start`, if it is near; other kinds of brackets are ignored."""
    opened, closed = text[start], {"(": ")", "{": "}", "[": "]"}[text[start]]
    depth = 0
    for place in range(start, min(len(text), start + _NEAR)):
        depth += {opened: 1, closed: -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None


def _mixed(found: re.Match[str]) -> str:
    """1 1/2 as a fraction; unchanged if the second part is not below 1."""
    whole, top, bottom = (int(part) for part in found.groups())
    return _fraction(whole + Fraction(top, bottom)) if top < bottom else found[0]


def _repeating(text: str) -> str:
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r" \\cup ", text)
    text = _LARGE.sub(lambda found: rf"\times 10^{{{_POWERS[found[2]]}}}", text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = re.sub(r"\{(\\(?:overline|bar|dot)\s*\{\d+\})\}", r"\1", text)
    for pattern in _REPEATING:
        text = pattern.sub(_as_fraction, text)
    return _GOES_ON.sub(_as_it_goes_on, text)


def _as_fraction(found: re.Match[str]) -> str:
    parts = found.groupdict()
    unit = re.sub(r"\D", "", parts["unit"] or parts["digit"])
    return (parts.get("sign") or "") + _fraction(_value(parts["whole"], parts["first"], unit))


def _as_it_goes_on(found: re.Match[str]) -> str:
    """0.1666… as a fraction; 3.14159265… to its given digits; 3.1… unchanged, because it is too short to compare."""
    whole, digits = found.groups()
    for size in range(1, len(digits) // 2 + 1):
        same = 0
        while same < len(digits) - size and digits[-1 - same] == digits[-1 - same - size]:
            same += 1
        first, seen = digits[: len(digits) - size - same], size + same
        # A long unit that occurs only twice, after other digits, is a coincidence: 2.7 1828 1828… is e.
        if seen >= 2 * size and (size < 3 or not first or seen >= 3 * size):
            return _fraction(_value(whole, first, digits[len(first) : len(first) + size]))
    return f"{whole}.{digits}" if len((whole + digits).lstrip("0")) >= _ENOUGH_DIGITS else f"{whole}.{digits}..."


def _value(whole: str, first: str, unit: str) -> Fraction:
    """The number whose digits after the point are `first` and then `unit`, repeated for ever."""
    start = Fraction(int(f"{whole or 0}{first}"), 10 ** len(first))
    return start + Fraction(int(unit), (10 ** len(unit) - 1) * 10 ** len(first))


def _fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value)
