"""The trainer's own tests see a relative fault of 1e-4: each is run with one planted, and must fail."""

import runpy
from pathlib import Path

import pytest

from opsd.distill import divergence
from opsd.engine import TorchEngine
from opsd.teacher import LocalTeacher

pytestmark = pytest.mark.e2e
TESTS = Path(__file__).parents[1]
PLACES = ("trainer/test_update", "engine/test_torch_engine", "model/test_lora")
UPDATE, ENGINE, LORA = (runpy.run_path(str(TESTS / f"{place}.py")) for place in PLACES)
FAULT = 1 + 1e-4
SEEN = "is what rounding may cost"


def scale_loss(monkeypatch):
    whole = divergence.GRADIENTS["reverse_kl"]

    def off(*args):
        loss_B, mass_B = whole(*args)
        return loss_B * FAULT, mass_B

    monkeypatch.setitem(divergence.GRADIENTS, "reverse_kl", off)


@pytest.fixture
def learner(make_model, make_rollout):
    return UPDATE["Learner"](make_model, make_rollout)


def test_a_loss_that_is_off_is_seen_beside_the_statistics(learner, monkeypatch):
    scale_loss(monkeypatch)
    for test in ("test_the_loss_is_the_mean_over_tokens_never_a_mean_of_means",):
        with pytest.raises(AssertionError, match=SEEN):
            UPDATE[test](learner)


def test_a_row_shifted_in_one_micro_batch_is_seen(learner, monkeypatch):
    whole = LocalTeacher.hidden

    def off(self, batches):
        first, *rest = whole(self, batches)
        # With a single micro-batch nothing is shifted: it is what the others are compared with.
        return [first.roll(1, 0), *rest] if rest else [first]

    monkeypatch.setattr(LocalTeacher, "hidden", off)
    with pytest.raises(AssertionError, match=SEEN):
        UPDATE["test_packing_and_chunk_size_change_neither_loss_nor_gradient"](learner, "all", {}, {"max_tokens": 16})


@pytest.mark.parametrize("test", ["the_gradient_is_that_of_the_sum_over_the_count"])
def test_a_division_by_nearly_the_count_is_seen(test, monkeypatch, make_model, make_rollout):
    whole = TorchEngine.backward
    # A batch of one token is divided rightly: it is what the other is compared with.
    monkeypatch.setattr(
        TorchEngine, "backward", lambda self, loss, count: whole(self, loss, count if count == 1 else count * FAULT)
    )
    make_engine, teacher, rollouts = (ENGINE[name].__wrapped__ for name in ("make_engine", "teacher", "rollouts"))
    with pytest.raises(AssertionError, match=SEEN):
        ENGINE[f"test_{test}"](make_engine(make_model), teacher(make_model), rollouts(make_rollout))


@pytest.mark.parametrize("family", [("qwen3", True), ("llama", False)])
def test_a_weight_that_is_off_in_the_checkpoint_is_seen(
    family, monkeypatch, make_model, make_rollout, tokenizer, tmp_path
):
    whole = TorchEngine.weights

    def off(self):
        found = whole(self)
        name = next(name for name in found if name.endswith("down_proj.weight"))
        return {**found, name: found[name] * FAULT}

    monkeypatch.setattr(TorchEngine, "weights", off)
    rollouts = LORA["rollouts"].__wrapped__(make_rollout)
    with pytest.raises(AssertionError, match=SEEN):
        LORA["test_a_checkpoint_is_the_plain_model_with_the_adapter_beside_it"](
            make_model, tokenizer, rollouts, tmp_path, *family, LORA["LORA"]
        )
