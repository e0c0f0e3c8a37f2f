"""report.html: which figures there are, what they are drawn from, and that no text of a run is markup."""

import re

import pandas as pd
import pytest

import report as report_script
from opsd.utils.errors import UserError
from reporting.plots import _curve
from reporting.runs import by_protocol, read_runs
from reporting.tokens import plane, read_tokens

ALL = {"a": 0.5, "b": 0.5, "c": 0.75, "d": 0.25}
STEPS = tuple(
    {"step": n, "loss/nats": 1 / n, "mem/peak_gib": 1.0, "time/step_s": 2.0, "time/rollout_s": 1.0} for n in range(1, 9)
)


def write(folder, table="table5"):
    report_script.main(folder, table, folder.parent / "out")
    return (folder.parent / "out" / "report.html").read_text()


def titles(page):
    return re.findall(r"<figcaption><b>(.*?)</b>", page)


def save_tokens(run, **columns):
    (run / "tokens").mkdir()
    pd.DataFrame(columns).to_parquet(run / "tokens" / "step_1.parquet")


@pytest.mark.e2e
def test_a_figure_is_there_exactly_where_it_has_data(make_run):
    folder = make_run("all", 1.0, ALL, metrics=({"step": 1},))
    assert titles(write(folder)) == ["Figure 1. Accuracy by rule."]
    make_run("soft_or", 0.2, ALL, metrics=STEPS)
    make_run("soft_or", 0.5, ALL, metrics=STEPS)
    save_tokens(folder / "all-1.0-2-seed0", entropy=[0.1, 0.9], reverse_kl=[0.0, 2.0], quadrant=[4, 1])
    assert titles(write(folder)) == [
        "Figure 1. Accuracy by rule.",
        "Figure 2. Entropy and divergence of every token.",
        "Figure 3. Accuracy against retention.",
        "Training curves.",
        "Memory and time.",
    ]


@pytest.mark.e2e
def test_average_and_best_are_drawn_for_the_agentic_table_only(make_run):
    folder = make_run("all", 1.0, ALL, best=0.75)
    assert "Figure 4. Average and best of k." in titles(write(folder, "table7"))
    assert "Figure 4. Average and best of k." not in titles(write(folder, "table5"))


@pytest.mark.e2e
def test_every_figure_has_a_rendering_for_each_scheme_and_words_for_those_who_cannot_see_it(make_run):
    page = write(make_run("soft_or", 0.5, ALL, metrics=STEPS))
    pictures = re.findall(r"<picture>(.*?)</picture>", page, re.S)
    assert len(pictures) == len(titles(page)) == 3
    for picture in pictures:
        dark, light = re.findall(r'(?:srcset|src)="(data:image/svg\+xml;base64,[^"]+)"', picture)
        assert dark != light and "prefers-color-scheme: dark" in picture
        assert len(re.search(r'alt="([^"]+)"', picture)[1]) > 40


def test_no_text_of_a_run_is_markup_and_nothing_asks_the_network(make_run):
    folder = make_run("my:<script>alert(1)</script>", 0.5, ALL, name="hostile")
    page = write(folder)
    assert "<script" not in page and "my:&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert not re.findall(r"https?://|@import|url\(|<link|javascript:", page)


def test_a_page_of_unfinished_runs_says_so_and_has_no_figure(make_run):
    page = write(make_run("all", 1.0, ALL, done=False, name="half", metrics=({"step": 1},)))
    assert "Not finished, so not counted: half." in page and titles(page) == []


def group_of(folder):
    (group,) = by_protocol(read_runs(folder))
    return group


def test_figure_2_prefers_the_tokens_of_runs_on_all_tokens(make_run):
    make_run("all", 1.0, ALL)
    folder = make_run("soft_or", 0.5, ALL)
    assert read_tokens(group_of(folder)) is None
    save_tokens(folder / "soft_or-0.5-2-seed0", entropy=[1.0, 1.0], reverse_kl=[3.0, 3.0], quadrant=[1, 1])
    assert read_tokens(group_of(folder)).source == "2 tokens of 1 steps, soft_or 50 %"
    save_tokens(folder / "all-1.0-2-seed0", entropy=[0.0], reverse_kl=[0.5], quadrant=[4])
    found = read_tokens(group_of(folder))
    assert found.source == "1 tokens of 1 steps, trained on all tokens"
    assert (found.entropy_N.tolist(), found.reverse_kl_N.tolist(), found.quadrant_N.tolist()) == ([0.0], [0.5], [4])


def test_figure_2_states_the_shares_of_what_it_shows(make_run):
    splits = {"quadrant/entropy_split_nats": 0.5, "quadrant/divergence_split_nats": 1.0}
    folder = make_run("all", 1.0, ALL, metrics=({"step": 1, **splits}, {"step": 2}))
    # Σδ = 8: Q1 holds 6 of it, Q3 1.5, Q2 0.5; a zero is drawn at the floor, not lost
    save_tokens(
        folder / "all-1.0-2-seed0",
        entropy=[0.9, 0.1, 0.8, 0.0, 0.0],
        reverse_kl=[6.0, 1.5, 0.5, 0.0, 0.0],
        quadrant=[1, 3, 2, 4, 4],
    )
    tokens = read_tokens(group_of(folder))
    assert tokens.splits == (0.5, 1.0)
    ax = plane(tokens).axes[0]
    words = {text.get_text() for text in ax.texts}
    assert words == {
        "Q1: 20.0 % of tokens, 75.0 % of Σδ",
        "Q2: 20.0 % of tokens, 6.2 % of Σδ",
        "Q3: 20.0 % of tokens, 18.8 % of Σδ",
        "Q4: 40.0 % of tokens, 0.0 % of Σδ",
    }
    assert sum(ax.collections[0].get_array()) == 5


def test_a_damaged_token_record_is_one_line(make_run):
    folder = make_run("all", 1.0, ALL)
    (folder / "all-1.0-2-seed0" / "tokens").mkdir()
    (folder / "all-1.0-2-seed0" / "tokens" / "step_1.parquet").write_text("x")
    with pytest.raises(UserError, match=r"^[^\n]*step_1.parquet cannot be read[^\n]*$"):
        read_tokens(group_of(folder))


def test_a_curve_is_the_mean_over_seeds_with_its_range(make_run):
    make_run("all", 1.0, ALL, metrics=({"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}))
    folder = make_run(
        "all", 1.0, ALL, seed=1, metrics=({"step": 1, "x": 3.0}, {"step": 2, "x": 2.0}, {"step": 3, "x": 9.0})
    )
    curve = _curve(group_of(folder), "x")
    assert curve.index.tolist() == [1, 2]  # what both seeds logged
    assert curve.to_dict("list") == {"mean": [2.0, 2.0], "min": [1.0, 2.0], "max": [3.0, 2.0]}


def test_smoothing_looks_back_only_and_starts_with_the_first_value(make_run):
    # 120 steps: the mean over the last three
    values = [6.0, 0.0, 3.0, 3.0, *[0.0] * 116]
    folder = make_run("all", 1.0, {"a": 0.5}, metrics=tuple({"step": n + 1, "x": x} for n, x in enumerate(values)))
    assert _curve(group_of(folder), "x")["mean"].tolist()[:7] == pytest.approx([6.0, 3.0, 3.0, 2.0, 2.0, 1.0, 0.0])
