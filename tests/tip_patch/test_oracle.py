"""Proposition 1 by hand and against autograd, one token at a time."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import close, transformer
from transformers import AutoModelForCausalLM, Qwen3Config

import oracle as oracle_script
from opsd.data.packing import pack
from opsd.types import Prompt, Rollout
from tip_patch.oracle import (
    TokenWorth,
    by_quadrant,
    mean_gradient,
    measure,
    signal_to_curvature,
    token_gradients,
    token_losses,
)

# Through the one-layer model below and back.
GRADIENT = transformer(1, 8, backward=1)


@pytest.fixture(scope="module")
def tiny():
    """A random one-layer model with a tied head, two rollouts, and a teacher's log-probabilities."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    prompts = [Prompt("0", "", [3, 4], None), Prompt("1", "", [5], None)]
    rollouts = [Rollout(0, prompts[0], [6, 7, 1], False), Rollout(1, prompts[1], [2, 8], False)]
    micros = [pack([rollout], 100)[0] for rollout in rollouts]
    logs = [torch.randn(micro.student_tokens(), 11).log_softmax(-1) for micro in micros]
    return model, micros, logs


def plain_gradient(model, loss) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.numeric
def test_each_row_is_the_gradient_of_that_tokens_loss(tiny):
    model, micros, logs = tiny
    for micro, log_q_NV in zip(micros, logs, strict=True):
        g_NP = token_gradients(model, micro, log_q_NV)
        for n in range(micro.student_tokens()):
            logits_LV = model(input_ids=micro.input_ids_1L).logits[0]
            log_p_V = logits_LV[micro.rows_N[n]].log_softmax(-1)
            loss = (log_p_V.exp() * (log_p_V - log_q_NV[n])).sum()
            close(g_NP[n], plain_gradient(model, loss), *GRADIENT)


@pytest.mark.numeric
def test_the_mean_gradient_is_the_mean_of_the_rows(tiny):
    model, micros, logs = tiny
    rows = torch.cat([token_gradients(model, *pair) for pair in zip(micros, logs, strict=True)])
    close(mean_gradient(model, micros, logs), rows.mean(0), *GRADIENT)


@pytest.mark.numeric
def test_measured_columns_are_what_they_say(tiny):
    model, micros, logs = tiny
    gradient_P = mean_gradient(model, micros, logs)
    worth = measure(model, micros, logs, gradient_P)
    g_NP = torch.cat([token_gradients(model, *pair) for pair in zip(micros, logs, strict=True)])
    sums = (*GRADIENT, len(gradient_P))
    close(worth.alignment, g_NP @ gradient_P, *sums)
    close(worth.square, g_NP.square().sum(-1), *sums)
    parameters = dict(model.named_parameters())
    losses = torch.cat([token_losses(model, parameters, *pair) for pair in zip(micros, logs, strict=True)])
    close(worth.reverse_kl, losses, *transformer(1, 8), 11)
    assert worth.rollout.tolist() == [0, 0, 0, 1, 1]
    # φ²/M of one token in its own context is ‖∇L‖²·cos²
    own = worth.alignment**2 / worth.square
    close(own, worth.gradient_square * worth.cosine_square, 1, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(g_NP, gradient_P[None])
    close(worth.cosine_square, cosine.square(), *sums)


@pytest.mark.numeric
def test_no_weight_descends_further_than_the_oracles():
    alignment, square, rate, smoothness = 0.3, 2.0, 0.1, 4.0
    weights = np.linspace(-5, 5, 100_001)
    descents = rate * weights * alignment - smoothness / 2 * (rate * weights) ** 2 * square
    # w* = φ/(ηβM) = 0.3/(0.1·4·2) = 0.375; φ²/(2βM) = 0.09/16
    assert weights[descents.argmax()] == pytest.approx(0.375, abs=1e-4)  # the grid's step
    close(descents.max(), 0.09 / 16, 1, dtype=torch.float64)


class TestByQuadrant:
    # Q1: φ 2 and 4, M 1 and 7 → φ_Q = 3, M_Q = 4. Q4: φ 1, M 2; and one token without gradient
    WORTH = TokenWorth(
        alignment=np.array([2.0, 4.0, 1.0, 0.0]),
        square=np.array([1.0, 7.0, 2.0, 0.0]),
        local=np.array([1.0, 3.0, 5.0, 0.0]),
        entropy=np.zeros(4),
        reverse_kl=np.zeros(4),
        rollout=np.array([0, 1, 1, 1]),
        gradient_square=10.0,
    )

    def test_by_hand(self):
        found = by_quadrant(self.WORTH, np.array([1, 1, 4, 4]))
        assert set(found) == {1, 4}
        q1, q4 = found[1], found[4]
        assert (q1.share, q1.alignment, q1.square, q1.weight) == (0.5, 3.0, 4.0, 0.75)
        assert q1.descent == pytest.approx(9 / 8)
        # cos² = 4/10 and 16/70; ‖∇L‖²·mean/2
        assert q1.token_descent == pytest.approx(10 * (0.4 + 16 / 70) / 2 / 2)
        # Σφ = 6 of 7
        assert (q1.descent_share, q1.local_median) == (pytest.approx(6 / 7), 2.0)
        # Q4: φ_Q = 0.5, M_Q = 1; the token without gradient counts with cos² = 0, the other with 1/20
        assert q4.descent == pytest.approx(0.125)
        assert q4.token_descent == pytest.approx(10 * 0.05 / 2 / 2)

    def test_intervals_come_from_resampling_rollouts(self):
        q1 = by_quadrant(self.WORTH, np.array([1, 1, 4, 4]))[1]
        # both rollouts: 9/8; the first alone: 4/2 = 2; the second alone: 16/14
        assert q1.descent_interval == pytest.approx((9 / 8, 2.0))


class TestSignalToCurvature:
    @pytest.mark.numeric
    def test_by_hand(self):
        # P_S = (½, ½), P_T = (0.9, 0.1): g = (−0.4, 0.4), ‖g‖² = 0.32, gᵀHg = ½·0.16·2 − 0 = 0.16
        log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        close(signal_to_curvature(log_p, log_q), [2.0], 2)

    def test_where_the_student_is_certain_and_wrong_it_is_capped(self):
        log_p = torch.tensor([[0.0, -60.0]]).log_softmax(-1)
        assert signal_to_curvature(log_p, log_p.flip(-1), cap=50.0).tolist() == [50.0]

    def test_where_both_agree_it_is_zero(self):
        log_p = torch.tensor([[0.3, 0.7], [1.0, 0.0]]).log()
        assert signal_to_curvature(log_p, log_p).tolist() == [0.0, 0.0]


class TestScript:
    POCKET = Path(__file__).parents[2] / "assets" / "pocket"

    def run(self, monkeypatch, out, *more):
        models = [f"--{name}={self.POCKET / name}" for name in ("student", "teacher")]
        prompts = f"--prompts={self.POCKET / 'train.jsonl'}"
        argv = ["oracle.py", *models, prompts, f"--out={out}", "--rollouts=3", "--held_out=3", *more]
        monkeypatch.setattr(sys, "argv", argv)
        oracle_script.main()

    @pytest.mark.e2e
    def test_numbers_and_picture_are_written(self, monkeypatch, tmp_path, capsys):
        self.run(monkeypatch, tmp_path / "out")
        found = json.loads((tmp_path / "out" / "oracle.json").read_text())
        assert (tmp_path / "out" / "oracle.png").stat().st_size > 10_000
        assert len(found["splits"]) == 3 and found["tokens"] > 100
        for split in found["splits"]:
            rows = [split[q] for q in ("q1", "q2", "q3", "q4") if q in split]
            assert sum(row["share"] for row in rows) == pytest.approx(1.0)
            assert sum(row["descent_share"] for row in rows) == pytest.approx(1.0)
        assert "Q4" in capsys.readouterr().out

    @pytest.mark.parametrize("more", ["--splits=0.1", "--splits=low,0.1", "--rollouts=5000"])
    def test_bad_input_is_one_line_and_exit_code_2(self, more, monkeypatch, tmp_path, capsys):
        with pytest.raises(SystemExit) as caught:
            self.run(monkeypatch, tmp_path / "out", more)
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "out").exists()
