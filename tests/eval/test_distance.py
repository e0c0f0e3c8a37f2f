"""A model's distance from its teacher, against full logits in fp64."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from opsd.eval.distance import DistanceCommand, measure_distance, summary
from opsd.utils.errors import UserError

PROMPTS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3) for b in range(2)]


@pytest.fixture(scope="module")
def pair(make_model):
    return make_model(seed=0), make_model(seed=1)


@pytest.fixture(scope="module")
def folders(pair, make_folder):
    return tuple(str(make_folder(model)) for model in pair)


@pytest.fixture
def measure(folders, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))

    def run(model=folders[0], teacher=folders[1], **more):
        common = {"prompt_format": "raw", "max_new_tokens": 5, "samples": 2, "grader": "suffix", "device": "cpu"}
        values = {"prompts": str(prompts), "out": str(tmp_path / "distance.json"), **common, **more}
        return measure_distance(DistanceCommand(model=model, teacher=teacher, **values))

    return run


@pytest.mark.numeric
def test_numbers_are_those_of_full_logits_in_fp64(measure, pair, tmp_path):
    answers = tmp_path / "answers.json"
    found = measure(teacher_answers=str(answers))
    models = [one.double() for one in pair]
    tokenizer = AutoTokenizer.from_pretrained(found["model"])
    rows = json.loads(answers.read_text())["answers"]
    assert len(rows) == 2 * len(PROMPTS)
    for place, record in enumerate(PROMPTS):
        ids, parts = tokenizer(record["prompt"]).input_ids, []
        for response, _ in rows[2 * place : 2 * place + 2]:
            with torch.no_grad():
                logits = [one(input_ids=torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1] for one in models]
            # Rows of a head that no token of the tokenizer has get no probability.
            logp, logq = (of[:, : len(tokenizer)].log_softmax(-1) for of in logits)
            each = {
                "reverse_kl_nats": (logp.exp() * (logp - logq)).sum(-1),
                "forward_kl_nats": (logq.exp() * (logq - logp)).sum(-1),
                "entropy_nats": -(logp.exp() * logp).sum(-1),
                "top1_agree": (logp.argmax(-1) == logq.argmax(-1)).double(),
            }
            parts.append(each)
        for name in parts[0]:
            expected = float(torch.cat([part[name] for part in parts]).mean())
            # Two models of random weights in fp32.
            assert found["teacher"][name][place] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_a_model_is_at_no_distance_from_itself(measure, folders):
    found = measure(teacher=folders[0])
    for where in ("own", "teacher"):
        assert max(found[where]["reverse_kl_nats"]) < 1e-5
        assert set(found[where]["top1_agree"]) == {1.0}
    # The same seed draws the same answers.
    assert found["own"]["entropy_nats"] == found["teacher"]["entropy_nats"]


def test_its_own_answers_have_lengths_and_grades(measure):
    found = measure()
    assert len(found["prompts"]) == len(PROMPTS)
    assert all(0 < tokens <= 5 for tokens in found["own"]["tokens"])
    assert set(found["own"]["truncated"]) <= {0.0, 0.5, 1.0} and set(found["own"]["accuracy"]) <= {0.0, 0.5, 1.0}
    assert "reverse_kl_nats on the teacher's answers" in summary(found)


@pytest.mark.e2e
def test_the_teachers_answers_are_made_once_and_never_mistaken(measure, tmp_path):
    answers = tmp_path / "kept" / "answers.json"
    first = measure(teacher_answers=str(answers))
    kept = answers.read_text()
    again = measure(teacher_answers=str(answers))
    assert answers.read_text() == kept and again["teacher"] == first["teacher"]
    with pytest.raises(UserError, match="answers to other prompts"):
        measure(teacher_answers=str(answers), seed=7)
    answers.write_text(kept[:40])
    with pytest.raises(UserError, match="cannot be read"):
        measure(teacher_answers=str(answers))
