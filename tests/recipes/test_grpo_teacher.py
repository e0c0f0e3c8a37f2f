"""The GRPO teacher: our grades are the reward, in bounded time; TRL trains; the folder is a teacher."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from forked import python
from transformers import AutoTokenizer

from grpo_teacher import GradeReward, GrpoConfig, trainer_settings, training_rows
from opsd.config.cli import parse
from opsd.eval.grading import MATH, SUFFIX
from opsd.utils.errors import UserError

ROOT = Path(__file__).parents[2]
EOS = 9
STUDENT = ROOT / "assets" / "pocket" / "student"


class Counting:
    """A grader that counts its questions and takes `seconds` of a clock of its own for each."""

    def __init__(self, clock=None, seconds=0.0):
        self.asked, self._clock, self._seconds = [], clock, seconds

    def grade(self, response, gold):
        self.asked.append((response, gold))
        if self._clock is not None:
            self._clock[0] += self._seconds
        return response.endswith(gold)


def test_the_reward_is_the_graders_verdict_on_texts_and_on_chat_messages():
    texts = [r"so \boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{2}", "__import__('os').abort()"]
    reward = GradeReward(MATH, EOS, 60.0)
    ids = [[1, EOS]] * 4
    assert reward(completions=texts, completion_ids=ids, answer=["1/2"] * 4) == [1.0, 1.0, 0.0, 0.0]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions=chats, completion_ids=ids, answer=["1/2"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_a_completion_that_was_cut_off_is_wrong_as_in_evaluation():
    reward = GradeReward(SUFFIX, EOS, 60.0)
    rewards = reward(completions=["A24", "A24", ""], completion_ids=[[1, EOS], [1, 2], []], answer=["A24"] * 3)
    assert rewards == [1.0, 0.0, 0.0]


def test_equal_completions_of_a_prompt_are_graded_once():
    grader = Counting()
    reward = GradeReward(grader, EOS, 60.0)
    rewards = reward(completions=["x1", "x1", "x1"], completion_ids=[[EOS]] * 3, answer=["1", "1", "2"])
    assert rewards == [1.0, 1.0, 0.0] and grader.asked == [("x1", "1"), ("x1", "2")]


def test_a_batch_that_takes_too_long_ends_and_says_how_much_was_left(monkeypatch):
    clock, logged = [0.0], {}
    monkeypatch.setattr("grpo_teacher.time.monotonic", lambda: clock[0])
    grader = Counting(clock, seconds=10.0)
    reward = GradeReward(grader, EOS, 25.0)
    texts = [f"{n} A" for n in range(5)]
    rewards = reward(completions=texts, completion_ids=[[EOS]] * 5, answer=["A"] * 5, log_metric=logged.__setitem__)
    # asked at 0, 10 and 20 s; at 30 s the 25 are over: two of five
    assert len(grader.asked) == 3 and rewards == [1.0, 1.0, 1.0, 0.0, 0.0] and logged == {"grade/late_frac": 0.4}


def rows_of(tmp_path, records, **settings):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = GrpoConfig(model="m", prompts=str(file), out="o", prompt_format="raw", **settings)
    return training_rows(config, AutoTokenizer.from_pretrained(STUDENT))


def test_prompts_that_are_too_long_are_left_out_and_answers_stay_with_their_prompts(tmp_path):
    records = [
        {"prompt": "1+2=", "answer": "3"},
        {"prompt": "1+1+1+1=", "answer": "4"},
        {"prompt": "2+2=", "answer": 4},
    ]
    rows = rows_of(tmp_path, records, max_prompt_tokens=4)
    assert rows == [{"prompt": "1+2=", "answer": "3"}, {"prompt": "2+2=", "answer": "4"}]


def test_columns_of_other_names_are_read_as_named(tmp_path):
    record = {"question": {"text": "1+2="}, "gold": "3"}
    (row,) = rows_of(tmp_path, [record], prompt_field="question.text", answer_field="gold")
    assert row == {"prompt": "1+2=", "answer": "3"}


def test_a_prompt_without_an_answer_is_one_line(tmp_path):
    with pytest.raises(UserError, match="record 2 has no answer; GRPO needs one"):
        rows_of(tmp_path, [{"prompt": "1+2=", "answer": "3"}, {"prompt": "2+2="}])


def test_completions_of_a_step_are_shared_out_evenly_or_refused():
    config = GrpoConfig(model="m", prompts="p", out="o", prompts_per_step=8, samples_per_prompt=16, micro_batch=2)
    # 8 · 16 = 128 completions over 8 processes of 2 each: 8 passes
    assert trainer_settings(config, 8, cuda=True)["gradient_accumulation_steps"] == 8
    with pytest.raises(UserError, match="128 completions per step do not divide over 3 processes"):
        trainer_settings(config, 3, cuda=True)


def test_a_single_sample_has_nothing_to_be_compared_with():
    with pytest.raises(UserError, match="--samples_per_prompt 1: give 2 or more: GRPO compares samples"):
        GrpoConfig(model="m", prompts="p", out="o", samples_per_prompt=1)


@pytest.mark.parametrize("scale", ["paper", "pocket"])
def test_a_dry_run_prints_a_command_that_the_script_takes(project, scale):
    done = project.run("--beta", "0.001", recipe="grpo_teacher.sh", SCALE=scale, DRY_RUN="1", STEPS="7")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[0])
    config = parse(GrpoConfig, words[words.index("scripts/grpo_teacher.py") + 1 :], "grpo_teacher")
    assert (config.steps, config.beta) == (7, 0.001) and project.calls() == []
    processes = int(words[words.index("--num_processes") + 1]) if scale == "paper" else 1
    assert trainer_settings(config, processes, cuda=scale == "paper")["use_vllm"] == (scale == "paper")


def test_paper_scale_says_in_one_line_what_the_teacher_lacks(project):
    done = project.run(recipe="grpo_teacher.sh")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "missing: 8 GPUs (found 0; NUM_GPUS=N takes fewer), QWEN3_TEACHER_BASE, DATA_DIR" in done.stderr


# Trains as the script does, and writes down what each call of the reward was given and gave.
RECORDING = """
import json, sys
import grpo_teacher
whole = grpo_teacher.GradeReward.__call__
def recorded(self, **given):
    rewards = whole(self, **given)
    with open(RECORD, "a") as file:
        calls = {name: given[name] for name in ("completions", "completion_ids", "answer")}
        file.write(json.dumps({**calls, "rewards": rewards}) + "\\n")
    return rewards
grpo_teacher.GradeReward.__call__ = recorded
grpo_teacher.main()
"""


@pytest.mark.e2e
def test_two_steps_on_the_pocket_student_use_our_grades_and_leave_a_teacher(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[trl]'")
    out, record = tmp_path / "run", tmp_path / "calls.jsonl"
    flags = ["--model", str(STUDENT), "--prompts", str(ROOT / "assets" / "pocket" / "train.jsonl"), "--out", str(out)]
    flags += shlex.split("--steps 2 --prompts_per_step 4 --samples_per_prompt 8 --micro_batch 16 --max_new_tokens 40")
    flags += shlex.split("--max_prompt_tokens 16 --prompt_format raw --grader suffix --lr 1e-3")
    # Tests before this one may have left a launcher's variables behind: accelerate would look for its other ranks.
    inherited = {name: value for name, value in os.environ.items() if name not in {"LOCAL_RANK", "RANK", "WORLD_SIZE"}}
    script = RECORDING.replace("RECORD", repr(str(record)))
    done = python("-c", script, *flags, env={**inherited, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]

    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    assert [len(call["rewards"]) for call in calls] == [32, 32]
    for call in calls:
        given = (call[name] for name in ("completions", "completion_ids", "answer", "rewards"))
        for text, ids, gold, reward in zip(*given, strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert reward == float(ids[-1] == tokenizer.eos_token_id and text.endswith(gold))
    # what TRL trained on is what the grader said, in fp32
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    means = [line["rewards/grade/mean"] for line in logged if "rewards/grade/mean" in line]
    assert means == pytest.approx([sum(call["rewards"]) / 32 for call in calls], abs=1e-6)
    assert 0 < sum(means) < 2  # right and wrong ones: else every advantage was 0

    from opsd.model.loading import load_scorer

    start, end = (
        load_scorer(str(path), "--teacher", torch.float32, torch.device("cpu")).state_dict()
        for path in (STUDENT, out / "model")
    )
    assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)
    assert AutoTokenizer.from_pretrained(out / "model").get_vocab() == tokenizer.get_vocab()
    assert {file.suffix for file in (out / "model").iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert (out / "DONE").exists()
