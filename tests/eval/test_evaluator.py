"""Evaluation by hand arithmetic: an engine that reads its answers from a list, graded by their ending."""

import itertools
import json
import math

import numpy as np
import pytest

from opsd.config import EvalConfig
from opsd.data.rendering import PromptFormat
from opsd.eval.evaluator import (
    Evaluator,
    Suite,
    grade_rollouts,
    load_suites,
    pass_at,
    standard_error,
    summary,
    unread,
)
from opsd.eval.grading import MATH, SUFFIX, Grader
from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.errors import UserError

RAW = PromptFormat(kind="raw")


class Scripted:
    """RolloutEngine whose responses are given: for each problem its k answers; "…" marks a truncated one."""

    def __init__(self, answers: dict[str, list[str]], tokenizer) -> None:
        self._answers, self._tokenizer, self.asked = answers, tokenizer, []

    def generate(self, prompts, samples, sampling, seed):
        self.asked.append((samples, sampling, seed))
        return [
            Rollout(
                number * samples + k,
                prompt,
                self._tokenizer(text.removesuffix("…")).input_ids,
                truncated=text.endswith("…"),
            )
            for number, prompt in enumerate(prompts)
            for k, text in enumerate(self._answers[prompt.id])
        ]

    def sync(self):
        """Nothing to do."""


def suite_of(golds: dict[str, str], name="pocket") -> Suite:
    return Suite(name, [Prompt(number, "", [6], gold) for number, gold in golds.items()])


def scored(suite: Suite, rollouts, samples: int, grader: Grader, tokenizer) -> dict:
    evaluator = Evaluator([suite], EvalConfig(samples=samples), 8, tokenizer)
    evaluator.grader = grader
    return evaluator.statistics(suite, rollouts)


@pytest.fixture
def score(tokenizer):
    def score(golds, answers, grader=None):
        suite, samples = suite_of(golds), len(next(iter(answers.values())))
        rollouts = Scripted(answers, tokenizer).generate(suite.problems, samples, Sampling(), 0)
        return scored(suite, rollouts, samples, grader or SUFFIX, tokenizer)

    return score


GOLDS = {"p": "a1", "q": "a2", "r": "a3"}
ANSWERS = {
    "p": ["x;a1", "a1", "a9", "a1"],  # 3 of 4; most frequent a1: right
    "q": ["a9", "a9", "a2", "a2"],  # 2 of 4; a tie: the earlier one, a9, is wrong
    "r": ["a9", "a8", "a7", "a6"],  # 0 of 4
}


def test_mean_and_its_standard_error_are_over_problems(score):
    result = score(GOLDS, ANSWERS)
    # problems score 0.75, 0.5, 0: mean 5/12 = 0.416667; deviations 1/3, 1/12, −5/12:
    # squares 0.111111 + 0.006944 + 0.173611 = 0.291667, /2 = 0.145833, √ = 0.381881, /√3 = 0.220479
    assert result["mean@k"] == pytest.approx(5 / 12)
    assert result["stderr_problems"] == pytest.approx(0.220479, abs=1e-6)
    assert (result["k"], result["problems"]) == (4, 3)
    assert result["scores"] == {"p": 0.75, "q": 0.5, "r": 0.0}


def test_the_spread_over_samples_is_that_of_the_draws_accuracies(score):
    # draws, over p q r: 1 0 0 | 1 0 0 | 0 1 0 | 1 1 0 → 1/3, 1/3, 1/3, 2/3: mean 5/12, deviations −1/12 (3×), 1/4:
    # (3·1/144 + 1/16)/3 = 0.027778, √ = 0.166667
    assert score(GOLDS, ANSWERS)["std_samples"] == pytest.approx(1 / 6)


def test_best_and_majority_by_hand(score):
    result = score(GOLDS, ANSWERS)
    assert result["best@k"] == pytest.approx(2 / 3)  # p and q are solved at least once
    assert result["majority@k"] == pytest.approx(1 / 3)  # p alone: q ties and its earlier answer is wrong


def test_pass_at_j_is_the_mean_over_all_choices_of_j_samples(score):
    # by counting: of the C(5, 2) = 10 pairs of 5 samples with 2 right, 3 hold no right one
    assert pass_at(2, 5, 2) == pytest.approx(0.7)
    for samples, right, j in itertools.product(range(1, 7), range(7), range(1, 7)):
        if right <= samples and j <= samples:
            chosen = list(itertools.combinations([True] * right + [False] * (samples - right), j))
            assert pass_at(j, samples, right) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    result = score(GOLDS, ANSWERS)
    # p 3 of 4, q 2 of 4, r none: pass@1 is the mean, pass@4 is best@4,
    # pass@2 = (1 − 0/6 + 1 − 1/6 + 1 − 6/6)/3 = 11/18
    assert result["pass@k"] == pytest.approx({"1": 5 / 12, "2": 11 / 18, "4": 2 / 3})


def test_pass_at_j_covers_powers_of_two_and_k_itself(score):
    assert list(score({"p": "a1"}, {"p": ["a1"] * 6})["pass@k"]) == ["1", "2", "4", "6"]


def test_a_tie_goes_to_the_earlier_answer(score):
    assert score({"p": "a1"}, {"p": ["a1", "a9"]})["majority@k"] == 1.0
    assert score({"p": "a1"}, {"p": ["a9", "a1"]})["majority@k"] == 0.0


def test_truncated_answers_are_wrong_and_have_no_vote(score):
    # right text, but cut off: 1 of 4 is right, and it is the only vote
    result = score({"p": "a1"}, {"p": ["a1…", "a9…", "a9…", "a1"]})
    assert (result["mean@k"], result["majority@k"], result["truncated_frac"]) == (0.25, 1.0, 0.75)
    # none ends: no vote at all is a problem not solved
    assert score({"p": "a1", "q": "a2"}, {"p": ["a1…"], "q": ["a2"]})["majority@k"] == 0.5
    assert score({"p": "a1"}, {"p": ["a1…", "a1…"]})["majority@k"] == 0.0


def test_lengths_are_in_tokens(score):
    # x ; a 1 is 4 tokens, a 1 is 2
    result = score({"p": "a1"}, {"p": ["x;a1", "a1", "a1"]})
    assert (result["mean_tokens"], result["median_tokens"], result["max_tokens"]) == (pytest.approx(8 / 3), 2.0, 4)


def test_one_problem_or_one_sample_has_no_error(score):
    alone = score({"p": "a1"}, {"p": ["a1"]})
    assert (alone["stderr_problems"], alone["std_samples"]) == (None, None)
    assert standard_error(np.array([0.0, 1.0])) == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    assert standard_error(np.array([0.5])) is None


def test_a_grader_that_names_no_answers_gives_no_majority(score):
    result = score(GOLDS, ANSWERS, Grader(lambda response, gold: gold in response))
    assert result["majority@k"] is None
    assert result["mean@k"] == pytest.approx(5 / 12)
    flat = summary({"suites": {"pocket": result}})
    assert "eval/pocket/majority@4" not in flat


def test_math_answers_are_voted_on_by_their_text(tokenizer):
    suite = suite_of({"p": "12"})
    texts = ["\\boxed{12}", "\\boxed{ 012 }", "\\boxed{13}"]

    class Texts:
        def decode(self, ids, skip_special_tokens):
            return texts[ids[0]]

    rollouts = [Rollout(k, suite.problems[0], [k], False) for k in range(3)]
    result = scored(suite, rollouts, 3, MATH, Texts())
    assert result["mean@k"] == pytest.approx(2 / 3)
    assert result["majority@k"] == 1.0  # 12 and 012 are one answer


def test_special_tokens_are_no_part_of_the_graded_text(tokenizer):
    # a 1 EOS: the ending is a1
    prompt = Prompt("p", "", [6], "a1")
    rollouts = [Rollout(0, prompt, [*tokenizer("a1").input_ids, tokenizer.eos_token_id], False)]
    assert grade_rollouts(rollouts, SUFFIX, tokenizer) == [1.0]


def test_rewards_exist_only_where_every_prompt_has_an_answer(tokenizer):
    graded, open_ended = Prompt("p", "", [6], "a1"), Prompt("q", "", [6], None)
    ids = tokenizer("a1").input_ids
    assert grade_rollouts([], SUFFIX, tokenizer) is None
    assert (
        grade_rollouts([Rollout(0, graded, ids, False), Rollout(1, open_ended, ids, False)], SUFFIX, tokenizer) is None
    )
    assert grade_rollouts([Rollout(0, graded, ids, False), Rollout(1, graded, ids, True)], SUFFIX, tokenizer) == [
        1.0,
        0.0,
    ]


def test_a_truncated_answer_is_not_even_graded(tokenizer):
    grader = Grader(lambda response, gold: 1 / 0)
    assert grade_rollouts([Rollout(0, Prompt("p", "", [6], "a1"), [6], True)], grader, tokenizer) == [0.0]


def test_an_evaluation_states_its_sampling_and_depends_on_its_own_seed(tokenizer):
    config = EvalConfig(samples=4, temperature=0.6, top_p=0.9, top_k=20, grader="suffix", seed=7)
    suites = [suite_of(GOLDS), suite_of(GOLDS, "second")]
    engine = Scripted(ANSWERS, tokenizer)
    result = Evaluator(suites, config, 100, tokenizer).run(engine, "model", 50)
    assert (result["model"], result["step"]) == ("model", 50)
    stated = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 100, "samples": 4, "seed": 7}
    assert result["sampling"] == stated
    (first, second) = engine.asked
    assert first[:2] == (4, Sampling(0.6, 0.9, 20, 100))
    assert first[2] != second[2]  # each suite draws from a stream of its own …
    Evaluator(suites[:1], config, 100, tokenizer).run(engine, "other", None)
    assert engine.asked[2] == first  # … which neither the step nor the other suites change
    assert json.loads(json.dumps(result)) == result


def test_the_evaluations_own_length_goes_before_trainings(tokenizer):
    engine = Scripted(ANSWERS, tokenizer)
    config = EvalConfig(samples=4, grader="suffix", max_new_tokens=5)
    Evaluator([suite_of(GOLDS)], config, 100, tokenizer).run(engine, "model", 0)
    assert engine.asked[0][1].max_new_tokens == 5


def test_metric_names_carry_suite_and_k(score):
    flat = summary({"suites": {"pocket": score(GOLDS, ANSWERS)}}, "teacher_eval")
    assert flat.keys() == {
        "teacher_eval/pocket/mean@4",
        "teacher_eval/pocket/best@4",
        "teacher_eval/pocket/majority@4",
        "teacher_eval/pocket/stderr_problems",
        "teacher_eval/pocket/truncated_frac",
    }
    assert flat["teacher_eval/pocket/mean@4"] == pytest.approx(5 / 12)


# ---- suites


@pytest.fixture
def write(tmp_path):
    def write(records, name="suite.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / name

    return write


def test_suites_are_named_files_cut_at_the_limit(write, tokenizer):
    records = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    first, second = load_suites(
        (f"one={write(records)}", f"two={write(records, 'x=y.jsonl')}"), tokenizer, RAW, limit=1
    )
    assert (first.name, second.name) == ("one", "two")
    assert [problem.text for problem in first.problems] == ["a"]
    assert load_suites((), tokenizer, RAW, None) == []


@pytest.mark.parametrize("pair", ["math500", "math500=", "=file.jsonl", ""])
def test_a_suite_without_name_or_file_is_refused(tokenizer, pair):
    with pytest.raises(UserError, match=rf"^--eval.suite '{pair}': give NAME=FILE[^\n]+$"):
        load_suites((pair,), tokenizer, RAW, None)


def test_a_name_given_twice_is_refused(write, tokenizer):
    pair = f"one={write([{'prompt': 'a', 'answer': '1'}])}"
    with pytest.raises(UserError, match=r"^--eval.suite names 'one' twice[^\n]+$"):
        load_suites((pair, pair), tokenizer, RAW, None)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (
            [{"prompt": "a", "answer": "1"}, {"prompt": "b"}],
            "the problem with id '1' has no field 'answer', or a blank one",
        ),
        ([{"prompt": "a", "answer": " "}], "the problem with id '0' has no field 'answer', or a blank one"),
        # two problems under one id would share one score
        ([{"id": 5, "prompt": "a", "answer": "1"}, {"id": "5", "prompt": "b", "answer": "2"}], "the id '5'"),
        # a suite without its longest problems is another suite
        ([{"prompt": "a", "answer": "1"}, {"prompt": "abcd", "answer": "2"}], "1 problems are over"),
    ],
)
@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_a_suite_that_cannot_be_scored_whole_is_refused(write, tokenizer, records, said, overlong):
    path = write(records)
    how = PromptFormat(kind="raw", max_tokens=3, overlong=overlong)
    with pytest.raises(UserError, match=rf"^{path}[^\n]* {said}[^\n]+$"):
        load_suites((f"one={path}",), tokenizer, how, None)


def test_the_token_that_ends_a_response_is_not_graded_though_it_is_an_ordinary_one(tokenizer):
    prompt = Prompt("p", "", [6], "a1")
    ids = tokenizer("a1;", add_special_tokens=False).input_ids
    rollouts = [Rollout(0, prompt, ids, False)]
    assert grade_rollouts(rollouts, SUFFIX, tokenizer) == [0.0]
    assert grade_rollouts(rollouts, SUFFIX, tokenizer, frozenset({ids[-1]})) == [1.0]


def test_a_grader_that_finds_no_answer_in_any_whole_response_is_said(score):
    result = score({"p": "a1", "q": "a2"}, {"p": ["x;a1", "a1…"], "q": ["a2", "a9"]}, MATH)
    assert (result["answered_frac"], result["mean@k"]) == (0.0, 0.0)
    (line,) = unread({"suites": {"sums": result}})
    assert line.startswith("sums: the grader found no answer in any response. --eval.grader math reads \\boxed{")
    # Wrong answers that were read, and responses that were all cut off, are another matter.
    read = score({"p": "a1"}, {"p": ["a9", "a1…"]})
    assert read["answered_frac"] == 0.5
    cut = score({"p": "a1"}, {"p": ["a1…", "a1…"]})
    assert cut["answered_frac"] == 0.0
    assert unread({"suites": {"read": read, "cut": cut}}) == []
