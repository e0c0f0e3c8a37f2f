"""A problem: its text without answer instructions, the key that its copies share, its place in a split."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass

from opsd.utils.errors import UserError

# What the grader reads as an answer: the last \boxed{…}, else the last line "Answer: …" (opsd/eval/grading.py).
INSTRUCTIONS = {
    "boxed": "\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "answer": '\n\nPlease reason step by step, and put your final answer on its own last line after "Answer:".',
    "none": "",
}

# Instructions that copies of these sets have before or after the problem.
_PREFIXES = [
    # DAPO-Math-17k: "Answer: $Answer (without quotes)"; a widespread copy of it: "Answer: \boxed{$Answer}".
    r"Solve the following math problem step by step\.\s+The last line of your response should be of the form "
    r"Answer: (?:\$Answer \(without quotes\)|\\boxed\{\$Answer\}) where \$Answer is the answer to the problem\.",
]
_SUFFIXES = [
    r'Remember to put your answer on its own line after "Answer:"\.',
    # In 20 Chinese problems of DAPO-Math-17k: think step by step, give the answer as "Answer: \boxed{…}".
    r"让我们一步一步地思考。请以“Answer: \\boxed\{<final_answer>\}”的格式输出最终答案。[^\n]*",
    r"Please reason step by step,? and put your final answer within \\boxed\{\}\.?",
    r"Let's think step by step and output the final answer within \\boxed\{\}\.?",
]
_PREFIX = re.compile(rf"\s*(?:{'|'.join(_PREFIXES)})", re.IGNORECASE)
# The hub's file wraps even problems that already have an instruction.
_SUFFIX = re.compile(rf"(?:\s*(?:{'|'.join(_SUFFIXES)}))+\s*\Z", re.IGNORECASE)
_UNKNOWN = re.compile(
    r"last line of your response|answer on its own line|answer within \\boxed|Answer: \\boxed|step by step",
    re.IGNORECASE,
)

_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|limits|q?quad|[,;:!()\[\]])")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[.,](?=\d)")
_MARKS = re.compile(r'[${}.,:;?!。、"“”]')


@dataclass(frozen=True)
class Problem:
    """One problem. text: as in the source, without answer instructions. key: see `problem_key`. answer: gold."""

    text: str
    key: str
    answer: str

    @property
    def digest(self) -> str:
        """16 hexadecimal digits made from the key alone."""
        return hashlib.blake2b(self.key.encode(), digest_size=8).hexdigest()

    @property
    def place(self) -> float:
        """A number in [0, 1) made from the key alone, so that it does not depend on other rows."""
        return int(self.digest, 16) / 2**64


def strip_instruction(text: str, where: str) -> str:
    """The problem without a known answer instruction and outer blanks.

    Raises UserError, naming `where`, for an unknown instruction: left in, it would contradict ours.
    """
    bare = _SUFFIX.sub("", _PREFIX.sub("", text, count=1)).strip()
    found = _UNKNOWN.search(bare)
    if found:
        around = bare[max(0, found.start() - 30) : found.end() + 30].replace("\n", " ")
        raise UserError(
            f"{where} holds an answer instruction that is not known (…{around}…); "
            "add it to _PREFIXES or _SUFFIXES in scripts/mathdata/problems.py"
        )
    return bare


def without_spaces(text: str) -> str:
    """The text without spaces and line breaks."""
    return "".join(text.split())


def problem_key(text: str) -> str:
    """The key that copies of a problem share: the text without case, spacing, math delimiters and punctuation.

    $…$, \\(…\\) and \\[…\\] are the same, \\dfrac is \\frac, \\left and \\right are gone; a point or comma between
    digits stays. Copies of a problem in DAPO-Math-17k often differ only in these.
    """
    text = without_spaces(unicodedata.normalize("NFKC", text).lower())
    text = re.sub(r"\\[dt]frac", r"\\frac", _LAYOUT.sub("", text))
    return _MARKS.sub("", _BETWEEN_DIGITS.sub("·", text))
