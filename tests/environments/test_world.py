"""Whole runs in the travel world: what they log, that a killed one resumes to the same numbers, what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.config import from_json
from opsd.data.context import TeacherContext, TeacherPrompts
from opsd.data.rendering import PromptFormat
from opsd.environments.travel import TravelTask, generate_tasks, pocket_tasks, write_task_file
from opsd.environments.travel.evaluate import by_constraint, statistics
from opsd.environments.travel.score import PlanScore
from opsd.environments.travel.world import TravelWorld
from opsd.rollout import HFRollout
from opsd.rollout.agent import AgentRollout
from opsd.rollout.cached_agent import CachedAgentRollout
from opsd.run import checkpoint
from opsd.train import resume, start
from opsd.types import Prompt, Rollout
from opsd.utils.errors import UserError

PLANNERS = Path(__file__).resolve().parents[2] / "assets" / "pocket_planning"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of two steps in the word form with the pocket planners."""
    folder = tmp_path_factory.mktemp("planning")
    write_task_file(pocket_tasks(8, 0, "train"), folder / "train.jsonl")
    write_task_file(pocket_tasks(3, 0, "held_out"), folder / "held_out.jsonl")

    def make(out, **overrides):
        values = {
            "student": str(PLANNERS / "student"),
            "teacher": {"model": str(PLANNERS / "teacher")},
            "prompts": str(folder / "train.jsonl"),
            "out": str(out),
            "steps": 2,
            "prompts_per_step": 2,
            "environment": {"kind": "travel", "max_turns": 8},
            "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 100},
            "select": {"by": "entropy", "retention": 0.5},
            "optim": {"lr": 1e-3},
            "engine": {"device": "cpu", "micro_batch_tokens": 256},
            "eval": {"suite": [f"synthetic-travel={folder / 'held_out.jsonl'}"], "samples": 2},
            "checkpoint": {"every": 1},
            "telemetry": {"every": 2, "save_rollouts_every": 1},
            "track": {"progress": False},
            **overrides,
        }
        return from_json(values)

    return make


def lines_of(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in lines]


def weights_of(run: Path):
    return AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_2").state_dict()


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    start(settings(out))
    return out


@pytest.mark.e2e
def test_a_run_logs_plan_scores_and_keeps_masks(finished):
    lines = lines_of(finished)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {
        "eval/synthetic-travel/mean@2",
        "eval/synthetic-travel/best@2",
        "teacher_eval/synthetic-travel/mean@2",
    } <= set(lines[0])
    suite = json.loads((finished / "eval" / "step_2.json").read_text())["suites"]["synthetic-travel"]
    assert suite["problems"] == 3 and set(suite["scores"]) == {f"held_out-{n}" for n in range(3)}
    assert sum(entry["trips"] for entry in suite["constraints"].values()) == 9
    own = tokens = 0
    for line in (finished / "rollouts" / "step_1.jsonl").read_text().splitlines():
        rollout = json.loads(line)
        own += sum(rollout["student_mask"])
        tokens += len(rollout["student_mask"])
    # About half of a response is tool output, which is not among the tokens that are trained on.
    assert lines[1]["rollout/tokens"] == own < 0.7 * tokens
    assert 0.4 < lines[1]["select/kept_frac"] <= 0.5 and 0.0 < lines[2]["rollout/reward"] < 1.0
    teacher = json.loads((finished / "eval" / "teacher.json").read_text())["suites"]["synthetic-travel"]
    assert teacher["mean@k"] > 0.8 > lines[0]["eval/synthetic-travel/mean@2"]


@pytest.mark.e2e
def test_a_run_that_stopped_resumes_to_the_same_numbers(finished, settings, tmp_path, monkeypatch):
    whole = checkpoint.save

    def save(folder, model, tokenizer, state, *rest):
        if state.step == 2:
            raise KeyboardInterrupt
        return whole(folder, model, tokenizer, state, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        start(settings(tmp_path / "run"))
    monkeypatch.setattr(checkpoint, "save", whole)
    resume(tmp_path / "run")
    assert lines_of(tmp_path / "run") == lines_of(finished)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_word_form_samples_on_one_cache_and_the_chat_form_turn_by_turn(settings, tmp_path):
    config, tokenizer = settings(tmp_path), AutoTokenizer.from_pretrained(PLANNERS / "student")
    model = AutoModelForCausalLM.from_pretrained(PLANNERS / "student")
    engine = HFRollout(model, tokenizer, 4)
    world = TravelWorld(config, tokenizer)
    assert isinstance(world.episodes(engine), CachedAgentRollout)
    world._in_words = False
    assert isinstance(world.episodes(engine), AgentRollout)


def test_a_teacher_may_be_asked_something_else_than_the_query_with_the_same_tools_behind_it(settings, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(PLANNERS / "student")
    world = TravelWorld(settings(tmp_path), tokenizer)
    asking = TeacherPrompts(TeacherContext("{prompt} {prompt}"), tokenizer, PromptFormat(kind="raw"), most=100)
    first, *_ = asking.of_episodes(world.prompts, world)
    assert first.teacher_ids == 2 * first.ids and first.task is world.prompts[0].task
    assert world.column(first, "form") == "words" and world.column(first, "nothing") is None
    unknown = TeacherPrompts(TeacherContext("{prompt} {lang}"), tokenizer, PromptFormat(kind="raw"), most=100)
    with pytest.raises(UserError, match="lacks words of the word form"):
        unknown.of_episodes(world.prompts, world)


def test_what_cannot_serve_is_refused_before_anything_is_written(settings, tmp_path):
    write_task_file(generate_tasks(1, 0), tmp_path / "chat.jsonl")
    task = pocket_tasks(1, 0)[0]
    write_task_file([task, task], tmp_path / "twice.jsonl")
    write_task_file([TravelTask("0", "en", "q", task.meta)], tmp_path / "bare.jsonl")
    rollout = {"samples_per_prompt": 2, "max_prompt_tokens": 7, "max_new_tokens": 40}
    for overrides, says in (
        ({"prompts": str(tmp_path / "none.jsonl")}, "does not exist"),
        ({"prompts": str(tmp_path / "chat.jsonl")}, "no chat template"),
        ({"prompts": str(tmp_path / "bare.jsonl")}, "has no complete database"),
        ({"eval": {"suite": [f"a={tmp_path / 'twice.jsonl'}"]}}, "holds a task twice"),
        ({"eval": {"suite": ["a"]}}, "give NAME=FILE"),
        ({"rollout": rollout}, "opens with 8 tokens, over --rollout.max_prompt_tokens 7"),
        ({"rollout": {**rollout, "overlong_prompts": "drop"}}, "all 8 tasks are over"),
    ):
        with pytest.raises(UserError, match=says):
            start(settings(tmp_path / "run", **overrides))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"kind": "travel", "max_turns": 0}, "--environment.max_turns 0"),
        ({"kind": "travel", "tool_output_characters": -1}, "--environment.tool_output_characters -1"),
        ({"deepplanning_root": "x"}, "--environment.kind travel only"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, tmp_path, environment, says):
    with pytest.raises(UserError, match=says):
        settings(tmp_path, environment=environment)


def episode(trip, truncated=False):
    return Rollout(0, Prompt(trip, "", [1], "x"), [2, 3, 4], truncated, [True, False, True])


def test_means_best_and_their_standard_errors_by_hand():
    # Trip a: 1 and 1/2; trip b: 0 and 1/2. Means 3/4 and 1/4, bests 1 and 1/2.
    kept = ((True, True), (True, False), (False, False), (False, True))
    scores = [PlanScore({"x": one, "y": two}, True, one) for one, two in kept]
    found = statistics([episode(trip) for trip in "aabb"], scores, 2)
    assert (found["mean@k"], found["best@k"], found["hard_all"]) == (0.5, 0.75, 0.25)
    # Standard error of two values is half their distance.
    assert (found["stderr_problems"], found["stderr_best"]) == (pytest.approx(0.25), pytest.approx(0.25))
    assert found["scores"] == {"a": 0.75, "b": 0.25} and found["commonsense"] is None
    assert found["constraints"]["x"] == {"mean": 0.5, "trips": 2, "stderr_problems": pytest.approx(0.5)}
    assert (found["valid_frac"], found["mean_student_tokens"], found["mean_tokens"]) == (0.5, 2.0, 3.0)


def test_a_constraint_counts_only_the_trips_that_have_it():
    scores = [PlanScore({"x": True}, True, True)] * 2 + [PlanScore({"y": False}, True, True)] * 2
    assert by_constraint(scores, 2) == {"x": {"mean": 1.0, "trips": 1}, "y": {"mean": 0.0, "trips": 1}}
