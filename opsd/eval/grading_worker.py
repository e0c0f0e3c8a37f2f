"""The process behind `opsd.eval.grading`: compares two answers a line with math-verify, JSON in, JSON out."""

import json
import os
import re
import resource
import signal
import sys

from math_verify import parse, verify

# Hard limits beneath the parent's: a power such as 9^{9^{9}} runs in C code, deaf to Python's own signals, and must
# neither outlive a parent that was killed nor take the machine's memory.
CPU_SECONDS = 30.0
MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Answer {"answer", "gold"} lines with {"equal"}; the first line printed says that we are ready.

    math-verify's own time limits use signals, which work here: this is a main thread.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no reply
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, most))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # ends this process, unless set anew before
        question = json.loads(line)
        # A bare answer needs a box: without one math-verify misreads a fifth of MATH-500's gold answers.
        is_text = re.search(r"(?<!\\)\$|\\boxed", question["gold"]) is not None
        gold = parse(question["gold"] if is_text else f"\\boxed{{{question['gold']}}}")
        answer = parse(f"\\boxed{{{question['answer']}}}" if question["boxed"] else question["answer"])
        print(json.dumps({"equal": bool(gold and answer and verify(gold, answer))}), file=replies, flush=True)


if __name__ == "__main__":
    main()
