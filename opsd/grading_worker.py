"""The process behind `opsd.grading`: compares two answers a line with math-verify, JSON in, JSON out."""

import json
import re
import sys

from math_verify import parse, verify


def main() -> None:
    """Answer {"answer", "gold"} lines with {"equal"}; the first line printed says that we are ready.

    math-verify's own time limits use signals, which work here: this is a main thread.
    """
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        # A bare answer needs a box: without one math-verify misreads a fifth of MATH-500's gold answers.
        is_text = re.search(r"(?<!\\)\$|\\boxed", question["gold"]) is not None
        gold = parse(question["gold"] if is_text else f"\\boxed{{{question['gold']}}}")
        answer = parse(f"\\boxed{{{question['answer']}}}" if question["boxed"] else question["answer"])
        print(json.dumps({"equal": bool(gold and answer and verify(gold, answer))}), flush=True)


if __name__ == "__main__":
    main()
