"""The process behind `opsd.eval.grading`: compares two answers per line with math-verify, JSON in, JSON out."""

import json
import os
import re
import resource
import signal
import sys
from decimal import Decimal
from typing import Any

from math_verify import LatexExtractionConfig, grader, parse, verify
from sympy import Basic, Float, Rational

# Hard limits in addition to the parent's: a power such as 9^{9^{9}} runs in C code, which Python's signal handlers
# cannot interrupt; it must neither outlive a killed parent nor use up the machine's memory.
CPU_SECONDS = 30.0
MEMORY_BYTES = 4 * 2**30
# math-verify rounds decimals to six places, and treats exact numbers less than 1e-15 apart as equal: right for numbers
# near 1, but all tiny ones are then equal. So the numbers that it accepts must also be relatively close.
EXACT_TOLERANCE, EXACT_DIGITS, ROUNDING = 1e-30, 50, 1e-14
# A decimal with at least this many digits may be a truncated number: 0.333333 for 1/3. A shorter one is exact.
ENOUGH_DIGITS = 6
_in_decimal_places = grader.sympy_numeric_eq


def numerically_equal(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Replaces math-verify's function with these parameters: its verdict, and the numbers must be relatively close.

    Elements of sets, intervals and matrices are passed one by one.
    """
    if not _in_decimal_places(a, b, float_rounding, numeric_precision):
        return False
    if not isinstance(a, Basic) or not isinstance(b, Basic):
        return True
    # 9% may mean 9.
    return is_close(a, b) or is_close(grader.get_pct_val(a, a), grader.get_pct_val(b, b))


def is_close(a: Any, b: Any) -> bool:
    """Whether two expressions are equal to the precision of their digits; variables are set to fixed values."""
    variables = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {variable: Rational(3 + 2 * place, 7 + 3 * place) for place, variable in enumerate(variables)}
    try:
        at_a, at_b = a.doit().subs(point), b.doit().subs(point)
        size = max(abs(value.evalf(EXACT_DIGITS)) for value in (at_a, at_b))
        difference = abs((at_a - at_b).evalf(EXACT_DIGITS))
        if not a.has(Float) and not b.has(Float):
            return bool(difference <= EXACT_TOLERANCE * size)
        return bool(difference <= ROUNDING * size or difference < 0.99 * last_place(at_a, at_b))
    except (TypeError, ValueError, AttributeError):
        return True  # not numbers: math-verify's verdict holds


def last_place(*values: Any) -> float:
    """The unit of the last digit of the coarsest decimal among `values`; 0 if it has too few digits to be truncated."""
    decimals = [Decimal(str(value)).normalize() for value in values if isinstance(value, Float)]
    units = [(int(decimal.as_tuple().exponent), len(decimal.as_tuple().digits)) for decimal in decimals]
    exponent, digits = max(units, default=(0, 0))
    return 10.0**exponent if digits >= ENOUGH_DIGITS else 0.0


def main() -> None:
    """Answer lines {"answer", "gold", "boxed"} with {"equal"}; the first line printed says that the process is ready.

    math-verify's own time limits use signals, which work here because this is a main thread.
    """
    grader.sympy_numeric_eq = numerically_equal
    # Without math-verify's fallback, which takes a stray number out of text that it cannot parse: 1 from "1 @ 2".
    latex = [LatexExtractionConfig()]
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps what a library prints out of the replies
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, most))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # ends this process, unless it is set again before
        question = json.loads(line)
        # A bare answer needs a box: without one math-verify misreads a fifth of MATH-500's gold answers.
        is_text = re.search(r"(?<!\\)\$|\\boxed", question["gold"]) is not None
        gold = parse(question["gold"]) if is_text else parse(f"\\boxed{{{question['gold']}}}", latex)
        answer = parse(f"\\boxed{{{question['answer']}}}", latex) if question["boxed"] else parse(question["answer"])
        print(json.dumps({"equal": bool(gold and answer and verify(gold, answer))}), file=replies, flush=True)


if __name__ == "__main__":
    main()
