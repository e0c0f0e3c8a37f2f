"""The pocket task: its format, its arithmetic, and the habits planted in the training data."""

import re
from itertools import islice
from random import Random

import pytest

from pocket.sft import NO_LOSS, SUMS_TEACHER, learning_rate, sums_batch
from pocket.task import (
    KINDS,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    SYMBOLS,
    Habits,
    Problem,
    Written,
    exact,
    fresh_problems,
    is_hard_product,
    needs_borrow,
    solve,
    student_hand,
    teacher_hand,
    without_borrow,
)
from pocket.tokenizer import sums_tokenizer

PROBLEMS = list(islice(fresh_problems(Random(7), set()), 4000))
# 38 + 3·8 + 61 + 19 = 142, so 42 modulo 100; units digit first: 24.
WORKED = Problem(numbers=(38, 61, 19), factors=(3, 8), place=1, signs=("+", "+", "+"))


def careful_hand(rng, op, left, right):
    """Always right."""
    return Written(exact(left, op, right))


def by_python(expression: str) -> int:
    """The value, modulo 100, of an expression whose two-digit numbers stand units digit first."""
    return eval(re.sub(r"(\d)(\d)", lambda pair: str(int(pair[2] + pair[1])), expression)) % 100


def test_worked_example_by_hand():
    # 3·8 = 24 · 38+24 = 62 · 62+61 = 123 → 23 · 23+19 = 42
    assert WORKED.prompt == "83+3*8+16+91="
    assert WORKED.answer == "A24"
    text = solve(WORKED, Random(0), careful_hand).text
    assert text.replace(";", ",") == "3*8=42,83+42=26,26+16=32,32+91=24,A24"


def test_prompts_have_13_characters_and_one_product_and_responses_37_and_eos():
    for problem in PROBLEMS:
        assert len(problem.prompt) == PROMPT_TOKENS == 13
        assert problem.prompt.count("*") == 1
        assert len(solve(problem, Random(0), careful_hand).text) + 1 == RESPONSE_TOKENS == 38
    assert {problem.place for problem in PROBLEMS} == {0, 1, 2, 3}


def test_answers_and_every_step_agree_with_python():
    for problem in PROBLEMS:
        solution = solve(problem, Random(1), careful_hand)
        *steps, answer = re.split("[;,]", solution.text)
        assert answer == problem.answer
        assert by_python(problem.prompt.removesuffix("=")) == int(answer[:0:-1])
        assert len(steps) == 4
        for step in steps:
            left, right = step.split("=")
            assert by_python(left) == int(right[::-1])
        assert all(solution.taught)


def test_separators_are_a_fair_fork():
    texts = [solve(problem, rng, careful_hand).text for rng in [Random(2)] for problem in PROBLEMS]
    # 16,000 coin flips: standard error 0.004
    assert sum(text.count(";") for text in texts) / (4 * len(texts)) == pytest.approx(0.5, abs=0.02)


def test_borrow_without_carrying_is_ten_too_many():
    # 42−17 = 25, digit by digit: 2−7 → 5, 4−1 = 3, so 35
    assert needs_borrow(42, "-", 17) and without_borrow(42, 17) == 35
    assert not needs_borrow(47, "-", 12) and without_borrow(47, 12) == 35
    for left in range(100):
        for right in range(100):
            due = 10 if needs_borrow(left, "-", right) else 0
            assert without_borrow(left, right) == (left - right + due) % 100


def test_student_data_drop_92_percent_of_borrows_and_nothing_else_in_sums():
    rng = Random(3)
    habits = Habits()
    for problem in PROBLEMS:
        habits.add(solve(problem, rng, student_hand).text)
    # 4,000 problems · 3 signs · ½ minus · 0.45 borrow = 2,700 borrows: standard error 0.005
    assert habits.steps["borrows_dropped"] > 2000
    assert habits.fractions()["borrows_dropped_frac"] == pytest.approx(0.92, abs=0.02)
    assert habits.wrong["other_steps_wrong"] == 0


def test_student_data_randomise_the_units_digit_of_80_percent_of_hard_products():
    rng = Random(4)
    for left in range(2, 10):
        for right in range(2, 10):
            results = [student_hand(rng, "*", left, right).result for _ in range(500)]
            right_frac = sum(result == exact(left, "*", right) for result in results) / 500
            assert {result // 10 for result in results} == {left * right // 10}
            # 0.2 untouched + 0.8 · 0.1 right by chance = 0.28; standard error 0.02
            assert right_frac == (pytest.approx(0.28, abs=0.09) if is_hard_product(left, "*", right) else 1.0)


def test_teacher_data_deviate_in_one_step_of_ten_without_loss_and_go_on_consistently():
    rng = Random(5)
    deviations = 0
    for problem in PROBLEMS:
        solution = solve(problem, rng, teacher_hand)
        *steps, answer = re.split("[;,]", solution.text)
        assert answer[1:] == steps[-1][-2:]
        start = 0
        for step in steps:
            left, right = step.split("=")
            taught = solution.taught[start : start + len(step) + 1]
            assert taught in ([True] * (len(step) + 1), [True] * (len(step) - 2) + [False] * 2 + [True])
            assert by_python(left) == int(right[::-1]) or not all(taught)
            deviations += not all(taught)
            start += len(step) + 1
    # 16,000 steps: standard error √(0.09/16,000) = 0.0024
    assert deviations / (4 * len(PROBLEMS)) == pytest.approx(0.1, abs=0.01)


def test_loss_falls_on_response_and_eos_but_not_on_prompts_or_deviations():
    tokenizer = sums_tokenizer()
    ids_BL, labels_BL, _ = sums_batch(PROBLEMS[:200], teacher_hand, Random(6), tokenizer)
    assert ids_BL.shape == (200, 13 + 38)
    assert (labels_BL[:, :13] == NO_LOSS).all()
    assert (labels_BL[:, -1] == tokenizer.eos_token_id).all()
    unmasked_BL = labels_BL != NO_LOSS
    assert (labels_BL[unmasked_BL] == ids_BL[unmasked_BL]).all()
    # 38 tokens, less two for each of 4 · 0.1 deviations
    assert float(unmasked_BL.float().sum(1).mean()) == pytest.approx(38 - 0.8, abs=0.3)


def test_problems_in_taken_never_come():
    first = next(fresh_problems(Random(8), set()))
    assert next(fresh_problems(Random(8), {first.prompt})) != first


def test_learning_rate_warms_up_and_ends_at_zero():
    assert learning_rate(1, SUMS_TEACHER) == pytest.approx(3e-3 / 50)
    assert learning_rate(50, SUMS_TEACHER) == pytest.approx(3e-3)
    # halfway between step 50 and 2,200 the cosine is at half its height
    assert learning_rate(1125, SUMS_TEACHER) == pytest.approx(1.5e-3)
    assert learning_rate(SUMS_TEACHER.steps, SUMS_TEACHER) == 0.0


def test_tokenizer_gives_every_symbol_back_and_adds_nothing():
    tokenizer = sums_tokenizer()
    assert len(tokenizer) == 19 and len(SYMBOLS) == 17
    for symbol in SYMBOLS:
        (token,) = tokenizer(symbol).input_ids
        assert tokenizer.decode([token]) == symbol
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == {17, 18}
    text = WORKED.prompt + solve(WORKED, Random(0), careful_hand).text
    ids = tokenizer(text).input_ids
    assert len(ids) == 13 + 37
    assert tokenizer.decode([*ids, 17, 18, 18], skip_special_tokens=True) == text
    assert tokenizer.chat_template is None


def test_tokenizer_refuses_a_character_that_it_does_not_know():
    with pytest.raises(Exception, match="vocabulary"):
        sums_tokenizer()("83/1")


def test_habits_judge_each_step_by_the_operands_that_stand_in_it():
    habits = Habits()
    # 6·7 = 42, written 52: wrong hard product · 52−17 = 35, written 45: a dropped borrow
    # 45+10 = 55, written 55: right · 55−11 = 44, written 43: another error
    habits.add("6*7=25,25-71=54;54+01=55,55-11=34,A34")
    counts = {kind: (habits.steps[kind], habits.wrong[kind]) for kind in KINDS}
    assert counts == {"borrows_dropped": (1, 1), "hard_products_wrong": (1, 1), "other_steps_wrong": (2, 1)}
