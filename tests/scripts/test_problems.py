"""When two texts are one problem, what is taken off a text, and how a set becomes problems."""

import pytest

from mathdata.clean import collect, split
from mathdata.problems import INSTRUCTIONS, Problem, problem_key, strip_instruction
from mathdata.sources import Row, read_answer
from opsd.eval.grading import extract_answer
from opsd.utils.errors import UserError

DOLLAR = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
BOXED = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "\\boxed{$Answer} where $Answer is the answer to the problem.\n\n"
)
REMEMBER = '\n\nRemember to put your answer on its own line after "Answer:".'
CHINESE = (
    "\n让我们一步一步地思考。请以“Answer: \\boxed{<final_answer>}”的格式输出最终答案。"
    "如果是选择题，请按顺序输出正确的选项，不带任何标点或空格。对于其他类型的问题，请只输出最终答案的数值。"
)


@pytest.mark.parametrize(
    "text",
    [
        DOLLAR + "What is $1+1$?" + REMEMBER,
        BOXED + "What is $1+1$?" + REMEMBER,
        BOXED + "What is $1+1$?",
        "What is $1+1$?" + CHINESE,
        DOLLAR + "What is $1+1$?" + CHINESE + REMEMBER,
        "What is $1+1$? Let's think step by step and output the final answer within \\boxed{}.",
        "What is $1+1$?" + INSTRUCTIONS["boxed"],
        "  What is $1+1$?\n",
    ],
)
def test_known_instructions_are_taken_off(text):
    assert strip_instruction(text, "row 1") == "What is $1+1$?"


@pytest.mark.parametrize(
    "text", ["Think step by step. What is 1+1?", "What is 1+1? Put the answer within \\boxed{} please."]
)
def test_an_instruction_that_is_not_known_is_an_error_and_not_left_in(text):
    with pytest.raises(
        UserError, match=r"row 7 holds an answer instruction that is not known \(….*(?:within .boxed|step by step)"
    ):
        strip_instruction(text, "row 7")


@pytest.mark.parametrize(("instruction", "response"), [("boxed", "so \\boxed{12}."), ("answer", "so 12.\nAnswer: 12")])
def test_an_answer_in_the_form_that_is_asked_for_is_found_by_the_grader(instruction, response):
    form = {"boxed": "\\boxed{}", "answer": '"Answer:"'}[instruction]
    assert form in INSTRUCTIONS[instruction]
    assert extract_answer(response) == "12"


SAME = [
    ("Find $x$.", " Find\n$x$. "),
    ("Find $x=\\frac12$", "find \\(x = \\dfrac12\\)."),
    ("so that $\\left|m-n\\right|=3$, find", "so that \\[|m - n| = 3\\] find"),
    ("the interval $(0,\\tfrac{\\pi}{2})$", "the interval $\\left(0,\\,\\frac{\\pi}{2}\\right)$"),
    ("inﬁnite grid", "infinite grid"),
    ("求最小值。", "求最小值."),
]
DIFFERENT = [
    ("Compute 1.5 + 2", "Compute 15 + 2"),
    ("Compute 1,000", "Compute 1000"),
    ("答案的形式为$-\\frac{k}{m}$", "答案的形式为$\\frac{k}{m}$"),
    ("f'(2)", "f(2)"),
    ("2*3", "23"),
    ("x^2 < 4", "x^2 > 4"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_case_spacing_delimiters_and_punctuation_do_not_make_another_problem(one, other):
    assert problem_key(one) == problem_key(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_signs_digits_and_relations_make_another_problem(one, other):
    assert problem_key(one) != problem_key(other)


# (text, answer); what becomes of it in the comment.
ROWS = [
    ("Find $a$.", "1"),  # kept, standing for this and the next four
    ("Find $a$.", "1"),  # exact copy
    (DOLLAR + "Find $a$." + REMEMBER, "1"),  # exact copy once the instruction is off
    ("Find  $a$.", "1"),  # differs in a blank
    ("Find \\(a\\)", "1"),  # differs in notation
    ("Find $b$.", "2"),  # the next one says 3: both are dropped, one problem
    ("Find $b$.", "3"),  # exact copy of a problem whose answers conflict
    ("Find $c$.", "-1"),  # minus one
    ("Find $d$.", "105263157894736848"),  # 2^53 is 9007199254740992: rounded
    ("Find $e$.", "9007199254740992"),  # kept: 2^53 itself is exact
    ("Find $f$.", None),  # blank
    (" \n", "4"),  # blank
    ("...", "5"),  # blank: nothing is left but punctuation
    ("Find $g$.", "7"),  # the next one says -1: conflicting, not minus one
    ("Find $g$", "-1"),  # differs in notation
]
COUNTS = {
    "rows": 15,
    "instructions": 1,
    "blank": 3,
    "exact_copies": 3,
    "spacing_copies": 1,
    "notation_copies": 2,
    "conflicting": 2,
    "minus_one": 1,
    "rounded": 1,
    "problems": 2,
}


def as_rows(pairs):
    return [Row(f"row {number}", text, answer) for number, (text, answer) in enumerate(pairs, start=1)]


def test_every_row_is_accounted_for():
    problems, counts = collect(as_rows(ROWS), doubtful=True)
    assert counts == COUNTS
    dropped = sum(COUNTS[name] for name in COUNTS if name not in {"rows", "instructions", "problems"})
    assert dropped == COUNTS["rows"] - COUNTS["problems"]
    assert [(problem.text, problem.answer) for problem in problems] == [
        ("Find  $a$.", "1"),  # of the copies the alphabetically first: a blank comes before $
        ("Find $e$.", "9007199254740992"),
    ]


def test_the_order_of_rows_changes_neither_problems_nor_counts():
    problems, counts = collect(as_rows(ROWS), doubtful=True)
    backwards, same = collect(as_rows(ROWS[::-1]), doubtful=True)
    assert set(problems) == set(backwards) and counts == same


def test_minus_one_and_giants_are_answers_where_the_labels_are_trusted():
    problems, counts = collect(as_rows([("Find $c$.", "-1"), ("Find $d$.", "105263157894736848")]), doubtful=False)
    assert [problem.answer for problem in problems] == ["-1", "105263157894736848"]
    assert counts["minus_one"] == counts["rounded"] == 0


def some_problems(count):
    return [Problem(f"Find {n}.", problem_key(f"Find {n}."), "1") for n in range(count)]


def test_the_split_hangs_on_each_problem_alone():
    problems = some_problems(1000)
    train, held_out = split(problems, 0.2)
    assert len(train) + len(held_out) == 1000
    # 200 expected, standard deviation √(1000·0.2·0.8) = 12.6: within four of them.
    assert 150 < len(held_out) < 250
    few_train, few_held_out = split(problems[500:][::-1], 0.2)
    assert set(few_train) <= set(train) and set(few_held_out) <= set(held_out)
    _, more_held_out = split(problems, 0.4)
    assert set(held_out) < set(more_held_out)


def test_the_first_held_out_problems_are_no_sample_of_the_file_s_order():
    _, held_out = split(some_problems(1000), 0.5)
    numbers = [int(problem.text[5:-1]) for problem in held_out]
    assert numbers != sorted(numbers)
    # The mean of 100 of 1000 numbers has a standard deviation of 29 about 500: within four of them.
    assert abs(sum(numbers[:100]) / 100 - 500) < 116


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ("025", "aime", "25"),
        ("000", "aime", "0"),
        (70, "aime", "70"),
        ("She has 3.\n#### 1,234", "gsm8k", "1234"),
        (" \\frac{1}{2} ", "text", "\\frac{1}{2}"),
        (3.0, "text", "3"),
        (2.5, "text", "2.5"),
        ("34", "dapo", "34"),
        ("", "aime", None),
        (None, "dapo", None),
        (float("nan"), "aime", None),
    ],
)
def test_answers_are_read_as_their_set_writes_them(value, kind, text):
    assert read_answer(value, kind, "row 1") == text


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [("1000", "aime", "0 to 999"), ("70^\\circ", "aime", "0 to 999"), ("12", "gsm8k", "'####'"), ([1], "text", "list")],
)
def test_what_is_no_answer_is_an_error(value, kind, said):
    with pytest.raises(UserError, match=f"row 1.*{said}"):
        read_answer(value, kind, "row 1")
