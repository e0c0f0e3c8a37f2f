"""The benchmark's table says what its cases say, and marks what was not measured."""

import pytest

from bench.case import Case
from bench.report import HEADER, draw, table


def row(method, tokens, seconds, **more):
    """A case as the benchmark records it, with half as much processor time again and a GiB for each 1000 tokens."""
    case = {
        "method": method,
        "tokens": tokens,
        "width": 256,
        "dtype": "float32",
        "selector": "all",
        "retention": 1.0,
        "threads": 2,
        "gflop": float(tokens),
        "seconds": seconds,
        "cpu_seconds": 1.5 * seconds,
        "peak_gib": tokens / 1000,
    }
    return {**case, **more}


def cells(text, method, tokens, kept="all"):
    """The table's line for a case, by column."""
    for line in text.splitlines():
        found = dict(zip(HEADER, [cell.strip() for cell in line.strip("|").split("|")], strict=False))
        if (found.get("method"), found.get("N"), found.get("kept")) == (method, str(tokens), kept):
            return found
    raise AssertionError(f"no line for {method} at {tokens}")


def test_ratios_are_to_the_baseline_of_the_same_size():
    text = table([row("ours", 1000, 2.0), row("graph_kept", 1000, 8.0), row("recomputed", 1000, 5.0)])
    ours = cells(text, "ours", 1000)
    assert (ours["of (a), wall"], ours["of (b), wall"], ours["of (a), CPU"]) == ("0.25", "0.40", "0.25")
    # 1000 GFLOP in 3 processor seconds on two threads.
    assert ours["GFLOP/s"] == "667"
    assert cells(text, "(b) recomputed", 1000)["of (a), wall"] == "0.62"


def test_a_selection_is_compared_with_all_tokens():
    text = table([row("ours", 1000, 1.0, selector="entropy", retention=0.2), row("graph_kept", 1000, 8.0)])
    assert cells(text, "ours", 1000, "entropy 20%")["of (a), wall"] == "0.12"


def test_a_graph_that_does_not_fit_is_extrapolated_and_marked():
    rows = [row("graph_kept", 1000, 3.0), row("graph_kept", 2000, 5.0), row("ours", 4000, 3.0)]
    text = table(rows)
    # Two seconds for each 1000 tokens: 5 + 2 · 2 = 9 s; a GiB for each 1000: 4 GiB.
    guessed = cells(text, "(a) graph kept", 4000)
    assert (guessed["wall s"], guessed["peak GiB"]) == ("~9.00", "~4.000")
    assert cells(text, "ours", 4000)["of (a), wall"] == "~0.33"
    assert cells(text, "(a) graph kept", 2000)["wall s"] == "5.00"


def test_repeats_give_their_median():
    text = table([row("ours", 1000, seconds) for seconds in (2.0, 9.0, 3.0)])
    assert cells(text, "ours", 1000)["wall s"] == "3.00"


def test_what_did_not_run_is_a_dash_with_its_reason():
    text = table([row("ours", 1000, 2.0), row("liger", 1000, 0.0, missing="liger-kernel is not installed")])
    assert cells(text, "(c) Liger", 1000)["wall s"] == "-"
    assert cells(text, "ours", 1000)["of (a), wall"] == "-"
    assert "(c) Liger: liger-kernel is not installed" in text


def test_the_figure_is_drawn_from_whatever_is_there(tmp_path):
    draw([row("ours", 1000, 2.0), row("ours", 1000, 1.0, selector="soft_or", retention=0.5)], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("selector", "retention", "products"),
    # Everything: two projections and two gradients. Scored by both models and half trained: 2 + 4/2. By entropy, a
    # fifth trained: 1 + 4/5.
    [("all", 1.0, 4.0), ("soft_or", 0.5, 4.0), ("entropy", 0.2, 1.8), ("random", 0.5, 2.0)],
)
def test_counted_operations_follow_the_rule(selector, retention, products):
    case = Case("ours", 10, 8, selector=selector, retention=retention, vocab=100)
    assert case.flop == pytest.approx(products * 2 * 10 * 100 * 8)
