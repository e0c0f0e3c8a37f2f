"""The loss core's own tests see a relative fault of 1e-4: each is run with one planted, and must fail."""

import runpy
from pathlib import Path

import pytest

from opsd.distill import divergence, rows
from opsd.distill.matmul import Projection

pytestmark = pytest.mark.e2e
HERE = Path(__file__).parent
EXACT, CONTRACT, STATS = (
    runpy.run_path(str(HERE / f"test_{name}.py")) for name in ("loss_exact", "loss_contract", "stats")
)
FAULT = 1 + 1e-4
SEEN = "is what rounding may cost"
DIVERGENCES = EXACT["DIVERGENCES"]


def scale_loss(monkeypatch, name):
    """The loss alone is off."""
    whole = divergence.GRADIENTS[name]

    def off(*args):
        loss_B, mass_B = whole(*args)
        return loss_B * FAULT, mass_B

    monkeypatch.setitem(divergence.GRADIENTS, name, off)


def scale_gradient(monkeypatch, name):
    """The logit gradient alone is off."""
    whole = divergence.GRADIENTS[name]

    def off(student_BV, *args):
        found = whole(student_BV, *args)
        student_BV.mul_(FAULT)
        return found

    monkeypatch.setitem(divergence.GRADIENTS, name, off)


def scale_hidden_gradient(monkeypatch, name):
    """The gradient of the hidden states alone is off."""
    whole = Projection.gradients_
    monkeypatch.setattr(Projection, "gradients_", lambda self, *args: whole(self, *args) * FAULT)


def drop_last_tile(monkeypatch, name):
    """The last tile of the vocabulary has no logits, and no part in the gradients."""
    whole, project_ = Projection._tiles, Projection.project_
    monkeypatch.setattr(Projection, "_tiles", lambda self: iter(list(whole(self))[:-1]))
    monkeypatch.setattr(
        Projection,
        "project_",
        lambda self, hidden_CD, out_CV, *others: project_(self, hidden_CD, out_CV.zero_(), *others),
    )


def shift_a_row(monkeypatch, name):
    """Each token gets its neighbour's logits, of the student and the teacher alike."""
    project_ = Projection.project_
    monkeypatch.setattr(
        Projection,
        "project_",
        lambda self, hidden_CD, out_CV, *others: out_CV.copy_(project_(self, hidden_CD, out_CV, *others).roll(1, 0)),
    )


PLANTS = [scale_loss, scale_gradient, scale_hidden_gradient, drop_last_tile, shift_a_row]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_thousand_tokens_show_a_planted_fault(plant, name, monkeypatch, make_case, naive, assert_close):
    plant(monkeypatch, name)
    with pytest.raises(AssertionError, match=SEEN):
        EXACT["test_a_thousand_tokens_and_an_odd_vocabulary_agree_too"](name, 300, make_case, naive, assert_close)


@pytest.mark.parametrize("plant", [scale_loss, scale_gradient, scale_hidden_gradient], ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_vocabulary_of_152_thousand_shows_a_planted_fault(plant, name, monkeypatch, make_case, naive, assert_close):
    plant(monkeypatch, name)
    with pytest.raises(AssertionError, match=SEEN):
        EXACT["test_a_vocabulary_of_152_thousand_and_shifted_logits_cost_no_digits"](
            name, make_case, naive, assert_close
        )


@pytest.mark.parametrize("plant", [scale_gradient], ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_bf16_gradients_show_a_planted_fault(plant, name, monkeypatch, make_case, naive):
    plant(monkeypatch, name)
    with pytest.raises(AssertionError):
        EXACT["test_bf16_rounds_gradients_without_a_bias"](name, make_case, naive)


@pytest.mark.parametrize("plant", PLANTS[:3], ids=lambda plant: plant.__name__)
@pytest.mark.parametrize(
    "test",
    [
        "test_views_and_transposed_tensors_are_fine",
        "test_fields_for_kept_rows_are_scored_there_alone_and_set_the_weights",
    ],
)
def test_contracts_show_a_planted_fault(plant, test, monkeypatch, make_case, make_rule, naive, assert_close):
    plant(monkeypatch, "reverse_kl")
    given = {"make_case": make_case, "make_rule": make_rule, "naive": naive, "assert_close": assert_close}
    function = CONTRACT[test]
    wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
    with pytest.raises(AssertionError, match=SEEN):
        function(**{name: given[name] for name in wanted})


@pytest.mark.parametrize("field", ["entropy_N", "reverse_kl_N", "forward_kl_N", "teacher_entropy_N"])
def test_statistics_show_a_planted_fault(field, monkeypatch, make_case, naive, assert_close):
    whole = rows.token_fields_

    def off(*args):
        found = whole(*args)
        return {**found, field: found[field] * FAULT}

    monkeypatch.setattr(rows, "token_fields_", off)
    with pytest.raises(AssertionError, match=SEEN):
        STATS["test_without_a_wish_the_five_required_fields_are_computed"](make_case, naive, assert_close)
