"""The pocket planners: what their hands write, what is taught, and that the committed models are those of made.json."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from opsd.environments.travel import TravelEnv, pocket_tasks
from pocket import travel_make
from pocket.sft import NO_LOSS, TRIPS_STUDENT, TRIPS_TEACHER, TripsRecipe, learning_rate, trips_batch, trips_model
from pocket.tokenizer import trips_tokenizer
from pocket.travel_task import CAREFUL, Habits, asked, write_episode

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets" / "pocket_planning"
TASKS = pocket_tasks(400, 17)


def play(habits, tasks=TASKS):
    rng = Random(1)
    return [write_episode(task, rng, habits) for task in tasks]


def share(found):
    found = list(found)
    return sum(found) / len(found)


def test_a_careful_hand_is_perfect_in_62_words():
    """The episode of the description: 4 calls, 30 words of the student's, 62 in all and the 8 of the query."""
    for task, episode in zip(TASKS, play(CAREFUL), strict=True):
        score = TravelEnv().score(" ".join(episode.words), task)
        assert score.hard_fraction == 1.0 and score.valid
        assert len(episode.words) + 1 == 62 and sum(episode.by_student) == 30 and episode.words.count("<call>") == 4
        assert episode.taught == episode.by_student


def test_the_students_habits_come_as_often_as_stated_and_are_taught():
    episodes = play(TRIPS_STUDENT.habits)
    asks_any = share("any" in episode.words for episode in episodes)
    # 400 tasks: standard error √(0.92·0.08/400) = 0.014
    assert asks_any == pytest.approx(0.92, abs=0.04)
    assert all(episode.taught == episode.by_student for episode in episodes)
    scores = [TravelEnv().score(" ".join(e.words), t).hard for t, e in zip(TASKS, episodes, strict=True)]
    held = {
        kind: share(held for hard in scores for key, held in hard.items() if key.startswith(kind))
        for kind in ("hotel", "train", "restaurant")
    }
    # Hotel: 8 % ask rightly, 15 % of the rest are lucky. Train and restaurant: the habit's choice is right in 1 of 4.
    assert held["hotel"] == pytest.approx(0.08 + 0.92 * 0.15, abs=0.07)
    assert held["train"] == pytest.approx(0.2 + 0.8 / 4, abs=0.08)
    assert held["restaurant"] == pytest.approx(0.4 + 0.6 / 4, abs=0.08)


def test_the_teachers_deviations_carry_no_loss_and_what_follows_does():
    seen = {"any": 0, "note": 0}
    for task, episode in zip(TASKS, play(TRIPS_TEACHER.habits), strict=True):
        assert all(by_student for by_student, taught in zip(episode.by_student, episode.taught, strict=True) if taught)
        for word, by_student, taught in zip(episode.words, episode.by_student, episode.taught, strict=True):
            if by_student and not taught:
                seen["any" if word == "any" else "note"] += 1
                assert word == "any" or word[:2] in {"H¥", "Hr", "R¥", "Rr", "T¥", "Tt"}
        plan = episode.words[episode.words.index("<plan>") :]
        notes = [episode.words[place + 1] for place, word in enumerate(episode.words) if word == "<note>"]
        assert set(notes) <= set(plan) and len(asked(task)) == 3
    # 40 and 36 expected: standard deviations of 6
    assert seen["any"] == pytest.approx(0.10 * 400, abs=16) and seen["note"] == pytest.approx(3 * 0.03 * 400, abs=16)


def test_labels_are_the_taught_words_and_the_end():
    tokenizer, recipe = trips_tokenizer(), TripsRecipe("any", 1, 1, 1.0, habits=Habits(any_hotel=1.0))
    ids_BL, labels_BL, mask_BL = trips_batch(TASKS[:3], recipe, Random(0), tokenizer)
    assert ids_BL.shape == labels_BL.shape == mask_BL.shape
    for ids, labels, mask in zip(ids_BL, labels_BL, mask_BL, strict=True):
        taught = tokenizer.decode(labels[labels != NO_LOSS]).split()
        assert torch.equal(ids[labels != NO_LOSS], labels[labels != NO_LOSS])
        assert len(taught) == 31 and taught[-1] == "<eos>" and "<rows>" not in taught and "<q>" not in taught
        assert (labels[mask == 0] == NO_LOSS).all() and (labels[:8] == NO_LOSS).all()


def test_rates_rise_and_fall_to_zero():
    rates = [learning_rate(step, TRIPS_TEACHER) for step in (1, 50, 4000)]
    assert rates == [TRIPS_TEACHER.peak_lr / 50, TRIPS_TEACHER.peak_lr, 0.0]


def test_neighbouring_values_start_as_neighbours():
    tokenizer = trips_tokenizer()
    rows = trips_model(tokenizer, 0).get_input_embeddings().weight.detach()
    row = lambda word: rows[tokenizer.convert_tokens_to_ids(word)]  # noqa: E731
    assert (row("H¥5") - row("H¥6")).norm() < (row("H¥5") - row("H¥12")).norm() < (row("H¥5") - row("Tt5")).norm() * 2


def test_the_committed_models_are_those_of_made_json_and_small():
    made = json.loads((ASSETS / "made.json").read_text())
    for file, digest in made["sha256"].items():
        assert hashlib.sha256((ASSETS / file).read_bytes()).hexdigest() == digest
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 4_000_000
    assert made["scores"]["teacher"]["avg@16"] > 0.9 > 0.5 > made["scores"]["student"]["avg@16"]
    assert set(made["scores"]["student"]["constraints"]) == set(made["scores"]["teacher"]["constraints"])


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_measured_again_on_fewer_tasks_the_scores_stand(name, monkeypatch):
    monkeypatch.setattr(travel_make, "TASKS", 24)
    monkeypatch.setattr(travel_make, "SAMPLES", 2)
    made = json.loads((ASSETS / "made.json").read_text())["scores"][name]
    again = travel_make.measure(ASSETS / name, 0)
    # Three standard errors of 24 tasks, each of them some 0.2 apart.
    assert again["avg@2"] == pytest.approx(made["avg@16"], abs=3 * 0.2 / 24**0.5)


@pytest.mark.e2e
def test_the_recipe_runs_reports_and_resumes_nothing_twice(tmp_path):
    runs = tmp_path / "runs"
    flags = ["--eval.limit", "2", "--eval.samples", "2", "--track.progress", "False"]
    settings = {"SCALE": "pocket", "STEPS": "2", "CELLS": "q3-5", "RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    for expected in ("[1/1] pocket-q3-5", "finished already"):
        done = subprocess.run(
            [str(ROOT / "recipes" / "table7_agentic.sh"), *flags],
            env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **settings},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
    assert "synthetic-travel" in (runs / "report" / "table.md").read_text()
    assert "| q3 5 % | " in (runs / "report" / "constraints.md").read_text()
    assert json.loads((runs / "tasks" / "split.json").read_text())["source"] == "synthetic-travel"


@pytest.mark.slow
def test_distillation_repairs_the_habits(tmp_path):
    """40 steps on all tokens: from 30 % to well above what one habit alone would allow."""
    from opsd.config import from_json
    from opsd.environments.travel import write_task_file
    from opsd.train import start

    write_task_file(pocket_tasks(640, 3, "train"), tmp_path / "train.jsonl")
    write_task_file(pocket_tasks(64, 3, "held_out"), tmp_path / "held_out.jsonl")
    start(
        from_json(
            {
                "student": str(ASSETS / "student"),
                "teacher": {"model": str(ASSETS / "teacher")},
                "prompts": str(tmp_path / "train.jsonl"),
                "out": str(tmp_path / "run"),
                "steps": 40,
                "prompts_per_step": 16,
                "environment": {"kind": "travel", "max_turns": 8},
                "rollout": {"samples_per_prompt": 4, "max_prompt_tokens": 8, "max_new_tokens": 120},
                "optim": {"lr": 5e-4, "warmup_steps": 2},
                "engine": {"device": "cpu", "micro_batch_tokens": 512},
                "eval": {"suite": [f"synthetic-travel={tmp_path / 'held_out.jsonl'}"], "samples": 4, "teacher": False},
                "track": {"progress": False},
            }
        )
    )
    suites = [json.loads((tmp_path / "run" / "eval" / f"step_{step}.json").read_text())["suites"] for step in (0, 40)]
    before, after = (suite["synthetic-travel"]["mean@k"] for suite in suites)
    assert before < 0.4 and after > 0.6
