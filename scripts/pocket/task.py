"""The pocket task: four terms, one of them a product of single digits, everything modulo 100.

Numbers have two digits, units digit first: the prompt `83+3*8+16+91=` asks for 38 + 3·8 + 61 + 19. Its worked
solution is `3*8=42,83+42=26,26+16=32;32+91=24;A24`: the product, then the terms from left to right, then the answer.
Each of its four separators is `;` or `,` with equal probability: a choice without consequences.

Not stated in the experiment's description, and fixed here: terms are uniform in 0–99, factors in 2–9, the product's
place and the signs are uniform; a product is hard when both factors are at least 4 (36 of the 64).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from opsd.utils.seeding import below

SYMBOLS = "0123456789+-*=;,A"
PROMPT_TOKENS = 13
RESPONSE_TOKENS = 38
"""37 characters and EOS."""

DEVIATION_PROBABILITY = 0.1
BORROW_DROP_PROBABILITY = 0.92
HARD_PRODUCT_PROBABILITY = 0.8
HARD_FACTOR = 4

_STEP = re.compile(r"(\d\d)([+-])(\d\d)=(\d\d)|(\d)(\*)(\d)=(\d\d)")


def number(value: int) -> str:
    """Two digits, units digit first."""
    return f"{value:02d}"[::-1]


@dataclass(frozen=True)
class Problem:
    """Three numbers and a product, joined by three signs. place: which of the four terms is the product (0–3)."""

    numbers: tuple[int, int, int]
    factors: tuple[int, int]
    place: int
    signs: tuple[str, str, str]

    def terms(self, product: int) -> list[int]:
        """The four terms' values, with `product` in the product's place."""
        return [*self.numbers[: self.place], product, *self.numbers[self.place :]]

    @property
    def prompt(self) -> str:
        """The 13 characters that the models see."""
        texts = [number(value) for value in self.numbers]
        texts.insert(self.place, "{}*{}".format(*self.factors))
        return texts[0] + "".join(sign + text for sign, text in zip(self.signs, texts[1:], strict=True)) + "="

    @property
    def answer(self) -> str:
        """The gold answer, e.g. `A24`: a right response ends with it."""
        total, *others = self.terms(self.factors[0] * self.factors[1])
        for sign, value in zip(self.signs, others, strict=True):
            total += value if sign == "+" else -value
        return "A" + number(total % 100)


@dataclass(frozen=True)
class Written:
    """What a hand wrote after a step's `=`. taught: whether these two digits count in the training loss."""

    result: int
    taught: bool = True


Hand = Callable[[Random, str, int, int], Written]
"""A rule that writes the result of `left op right`, maybe a wrong one."""


def exact(left: int, op: str, right: int) -> int:
    """The right result, modulo 100."""
    return {"+": left + right, "-": left - right, "*": left * right}[op] % 100


def needs_borrow(left: int, op: str, right: int) -> bool:
    """Whether a subtraction borrows from the tens."""
    return op == "-" and left % 10 < right % 10


def without_borrow(left: int, right: int) -> int:
    """left − right, digit by digit, each modulo 10: ten too much if a borrow is needed."""
    return (left // 10 - right // 10) % 10 * 10 + (left % 10 - right % 10) % 10


def is_hard_product(left: int, op: str, right: int) -> bool:
    """Whether this product is unreliable in the student's data."""
    return op == "*" and min(left, right) >= HARD_FACTOR


def teacher_hand(rng: Random, op: str, left: int, right: int) -> Written:
    """Right, but one result in ten is a random number that carries no loss: later steps learn to continue from it."""
    if rng.random() < DEVIATION_PROBABILITY:
        return Written(below(rng, 100), taught=False)
    return Written(exact(left, op, right))


def student_hand(rng: Random, op: str, left: int, right: int) -> Written:
    """Drops 92 % of borrows (confidently wrong); 80 % of hard products have a random units digit (unsure)."""
    if needs_borrow(left, op, right) and rng.random() < BORROW_DROP_PROBABILITY:
        return Written(without_borrow(left, right))
    result = exact(left, op, right)
    if is_hard_product(left, op, right) and rng.random() < HARD_PRODUCT_PROBABILITY:
        result = result // 10 * 10 + below(rng, 10)
    return Written(result)


@dataclass(frozen=True)
class Solution:
    """A response's 37 characters (without EOS), and for each whether it counts in the training loss."""

    text: str
    taught: list[bool]


def solve(problem: Problem, rng: Random, hand: Hand) -> Solution:
    """The solution as `hand` writes it; each step continues from what was written before it."""
    text, taught = "", []

    def step(left: int, op: str, right: int) -> int:
        nonlocal text
        written = hand(rng, op, left, right)
        question = f"{left}*{right}=" if op == "*" else f"{number(left)}{op}{number(right)}="
        text += question + number(written.result) + ";,"[below(rng, 2)]
        taught.extend([True] * len(question) + [written.taught] * 2 + [True])
        return written.result

    product = step(problem.factors[0], "*", problem.factors[1])
    total, *others = problem.terms(product)
    for sign, value in zip(problem.signs, others, strict=True):
        total = step(total, sign, value)
    answer = "A" + number(total)
    return Solution(text + answer, taught + [True] * len(answer))


def draw_problem(rng: Random) -> Problem:
    """One problem."""
    return Problem(
        numbers=(below(rng, 100), below(rng, 100), below(rng, 100)),
        factors=(2 + below(rng, 8), 2 + below(rng, 8)),
        place=below(rng, 4),
        signs=("+-"[below(rng, 2)], "+-"[below(rng, 2)], "+-"[below(rng, 2)]),
    )


def fresh_problems(rng: Random, taken: set[str]) -> Iterator[Problem]:
    """Endless problems, none of whose prompts is in `taken`; the caller adds to it prompts that must not come again."""
    while True:
        problem = draw_problem(rng)
        if problem.prompt not in taken:
            yield problem


@dataclass
class Habits:
    """How often the two planted habits could show in responses, and how often they did (counts of written steps)."""

    borrows: int = 0
    dropped: int = 0
    hard_products: int = 0
    wrong_hard_products: int = 0
    other_steps: int = 0
    wrong_other_steps: int = 0

    def add(self, response: str) -> None:
        """Count the steps of one response; each is judged by the operands written in it."""
        for match in _STEP.finditer(response):
            two, one = match.groups()[:4], match.groups()[4:]
            left, op, right, result = two if two[0] else one
            a, b, c = int(left[::-1]), int(right[::-1]), int(result[::-1])
            if needs_borrow(a, op, b):
                self.borrows += 1
                self.dropped += c == without_borrow(a, b)
            elif is_hard_product(a, op, b):
                self.hard_products += 1
                self.wrong_hard_products += c != exact(a, op, b)
            else:
                self.other_steps += 1
                self.wrong_other_steps += c != exact(a, op, b)

    def fractions(self) -> dict[str, float]:
        """Shares of borrows dropped, of hard products wrong, of all other steps wrong."""
        return {
            "borrows_dropped_frac": self.dropped / max(self.borrows, 1),
            "hard_products_wrong_frac": self.wrong_hard_products / max(self.hard_products, 1),
            "other_steps_wrong_frac": self.wrong_other_steps / max(self.other_steps, 1),
        }
