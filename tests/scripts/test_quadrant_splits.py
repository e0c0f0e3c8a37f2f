"""Shares of quadrants under pairs of splits, by hand on ten tokens."""

import json

import pandas as pd
import pytest

import quadrant_splits
from opsd.utils.errors import UserError

# Four solved tokens, three uncertain and agreed, two uncertain and disputed, one overconfident: 40, 50 and 10 %.
ROWS = [(0.0, 0.0, 0.0)] * 4 + [(1.0, 0.1, 0.5)] * 3 + [(1.0, 2.0, 1.0)] * 2 + [(0.0, 5.7, 1.5)]


@pytest.fixture
def record(tmp_path):
    file = tmp_path / "step_1.parquet"
    pd.DataFrame(ROWS, columns=list(quadrant_splits.COLUMNS)).to_parquet(file)
    return file


def test_shares_of_tokens_loss_and_gradient_by_hand(record):
    found = quadrant_splits.shares(quadrant_splits.read_tokens(record), "0.5", "1")
    assert found.tokens == [0.2, 0.3, 0.1, 0.4]
    # Σδ = 0.3 + 4 + 5.7 = 10, Σ‖gradient‖ = 1.5 + 2 + 1.5 = 5
    assert found.loss == pytest.approx([0.4, 0.03, 0.57, 0.0])
    assert found.gradient == pytest.approx([0.4, 0.3, 0.3, 0.0])
    assert found.misses == 0.0 and found.nats == (0.5, 1.0)


def test_what_lies_outside_the_papers_ranges_adds_up(record):
    # δ split at 3 nats: Q1 0, Q2 50, Q3 10, Q4 40 %: still in; at 6 nats there is no Q3: 3 points, and Q4 is 50 %: 3
    tokens = quadrant_splits.read_tokens(record)
    assert quadrant_splits.shares(tokens, "0.5", "3").misses == 0.0
    assert quadrant_splits.shares(tokens, "0.5", "6").misses == pytest.approx(0.06)


def test_all_pairs_are_written_nearest_first(record, tmp_path, capsys):
    quadrant_splits.main(record, tmp_path / "splits.json", ("0.5", "6"), markdown=True)
    # h at 6 nats: nothing is uncertain. h at 0.5, δ at 0.5: as by hand, for 0.5 splits δ as 1 does.
    assert "1 of 4 pairs" in capsys.readouterr().out
    pairs = json.loads((tmp_path / "splits.json").read_text())["pairs"]
    assert [pair["fits"] for pair in pairs] == [True, False, False, False]
    assert (pairs[0]["entropy_split"], pairs[0]["divergence_split"]) == ("0.5", "0.5")


def test_a_record_without_gradients_is_refused(tmp_path):
    file = tmp_path / "step_1.parquet"
    pd.DataFrame({"entropy": [1.0], "reverse_kl": [0.1]}).to_parquet(file)
    with pytest.raises(UserError, match="no column grad_norm"):
        quadrant_splits.read_tokens(file)
