"""What is committed under assets/pocket is what the scripts make, and the models have the planted habits."""

import hashlib
import json
import re
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from forked import python
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.utils.errors import UserError
from pocket.make import SAMPLES, as_jsonl, as_prompts, make, make_model, make_problems
from pocket.measure import greedy_habits, measure
from pocket.measure import main as measure_main
from pocket.sft import SUMS_STUDENT, SUMS_TEACHER
from pocket.task import fresh_problems
from pocket.tokenizer import sums_tokenizer

REPOSITORY = Path(__file__).parents[2]
ASSETS = REPOSITORY / "assets" / "pocket"
MADE = json.loads((ASSETS / "made.json").read_text())
PROBLEMS = make_problems(MADE["seed"])


def load(name: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(ASSETS / name), AutoTokenizer.from_pretrained(ASSETS / name)


def greedy(name: str, count: int) -> dict[str, float]:
    """Shares of the habits in one greedy response to each of so many problems that are in no file."""
    model, tokenizer = load(name)
    known = {problem.prompt for chosen in PROBLEMS.values() for problem in chosen}
    fresh = list(islice(fresh_problems(Random(11), known), count))
    habits = greedy_habits(model, tokenizer, as_prompts(fresh, tokenizer))
    assert habits.steps["borrows_dropped"] > count / 2 and habits.steps["hard_products_wrong"] > count / 3
    return habits.fractions()


def test_committed_problems_are_what_the_seed_makes():
    assert (ASSETS / "eval.jsonl").read_text() == as_jsonl(PROBLEMS["eval"])
    assert (ASSETS / "train.jsonl").read_text() == as_jsonl(PROBLEMS["train"])


def test_evaluation_training_and_choice_share_no_problem():
    prompts = [problem.prompt for chosen in PROBLEMS.values() for problem in chosen]
    assert {name: len(chosen) for name, chosen in PROBLEMS.items()} == {"eval": 256, "train": 4096, "choice": 256}
    assert len(set(prompts)) == len(prompts)


def test_models_are_never_trained_on_a_problem_of_the_files(monkeypatch: pytest.MonkeyPatch):
    """What `sums_batches` is told to leave out: the prompts of all three sets; `fresh_problems` leaves them out."""
    seen: set[str] = set()
    monkeypatch.setattr("pocket.make.sums_batches", lambda recipe, tokenizer, seed, taken: seen.update(taken) or [])
    make_model(SUMS_TEACHER, sums_tokenizer(), 0, PROBLEMS)
    assert seen == {problem.prompt for chosen in PROBLEMS.values() for problem in chosen}


def test_student_is_the_first_checkpoint_that_is_good_enough(monkeypatch: pytest.MonkeyPatch):
    # 10 % after 100 steps, 17.9 % after 200, 18 % after 300: training ends there
    found = iter([0.10, 0.179, 0.18, 0.5])
    monkeypatch.setattr("pocket.sft.train", lambda *_: iter([1.0] * 2200))
    monkeypatch.setattr("pocket.make.accuracy", lambda *_: {"mean@4": next(found)})
    assert make_model(SUMS_STUDENT, sums_tokenizer(), 0, PROBLEMS)[1] == 300
    assert make_model(SUMS_TEACHER, sums_tokenizer(), 0, PROBLEMS)[1] == 2200


@pytest.mark.parametrize(("name", "parameters"), [("teacher", 445_248), ("student", 149_216)])
def test_folders_load_as_they_are_with_a_tied_head(name: str, parameters: int):
    model, tokenizer = load(name)
    assert model.config.model_type == "qwen3"
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer("83+3*8+16+91=").input_ids
    assert len(ids) == 13
    assert tokenizer.decode(ids, skip_special_tokens=True) == "83+3*8+16+91="


def test_both_models_share_one_tokenizer_file():
    assert (ASSETS / "teacher" / "tokenizer.json").read_bytes() == (ASSETS / "student" / "tokenizer.json").read_bytes()


def test_assets_stay_small_and_are_the_files_that_were_measured():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3e6
    for file, digest in MADE["sha256"].items():
        assert hashlib.sha256((ASSETS / file).read_bytes()).hexdigest() == digest


def test_readme_states_the_measured_accuracies():
    readme = (ASSETS / "README.md").read_text()
    for name in ("teacher", "student"):
        assert f"{100 * MADE['models'][name][f'mean@{SAMPLES}']:.2f} %" in readme
    assert MADE["command"] in readme


def test_teacher_has_no_habit():
    assert all(share < 0.02 for share in greedy("teacher", 64).values())


def test_student_drops_borrows_and_is_unsure_of_hard_products_and_does_the_rest_right():
    shares = greedy("student", 256)
    # Its data drop 92 % of borrows: greedily, nearly all. The right units digit of a hard product has a chance of 0.28,
    # the others 0.08 each: a student that has learnt only part of that is often wrong.
    assert shares["borrows_dropped_frac"] > 0.85
    assert shares["hard_products_wrong_frac"] > 0.2
    assert shares["other_steps_wrong_frac"] < 0.1


@pytest.mark.parametrize(
    ("models", "samples", "expected"),
    [
        ((), 16, "no model was given; give a folder, e.g. assets/pocket/student"),
        ((str(ASSETS / "eval.jsonl"),), 16, "is a file; give a Hugging Face model folder"),
        ((str(ASSETS / "student"),), 0, "--samples 0: give a number above 0"),
    ],
)
def test_measure_says_what_is_wrong_with_its_input(models: tuple[str, ...], samples: int, expected: str):
    with pytest.raises(UserError, match=re.escape(expected)):
        measure_main(models, samples=samples)


@pytest.mark.e2e
@pytest.mark.parametrize(("script", "arguments"), [("make.py", ["--out", "{}/below"]), ("measure.py", ["{}"])])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, script: str, arguments: list[str]):
    file = tmp_path / "file"
    file.touch()
    done = python(f"scripts/pocket/{script}", *(word.format(file) for word in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert str(file) in line and "give a" in line


@pytest.mark.slow
def test_models_made_anew_are_as_accurate_as_the_committed_ones(tmp_path: Path):
    """About six minutes. Other machines round otherwise, and the student stands where accuracy rises steeply: it may
    differ by ten points, the teacher by one. The committed files themselves stay within two points of what is
    recorded: three standard errors of another draw (0.019 from sample to sample, so 0.019 · √(2/16) = 0.007)."""
    made = make(tmp_path / "pocket", MADE["seed"])
    for name, tolerance in (("teacher", 0.01), ("student", 0.10)):
        recorded = MADE["models"][name]["mean@16"]
        assert made["models"][name]["mean@16"] == pytest.approx(recorded, abs=tolerance)
        model, tokenizer = load(name)
        again = measure(model, tokenizer, ASSETS / "eval.jsonl", SAMPLES)
        assert again["mean@16"] == pytest.approx(recorded, abs=0.02)
