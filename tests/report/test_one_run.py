"""The report of a single run: its own numbers alone, and no row without any."""

import json
import re

import pytest

import report as report_script
from opsd.utils.errors import UserError

STEPS = tuple(
    {"step": n, "loss/nats": 4.0 / n, "rollout/tokens": 100, "rollout/truncated_frac": 0.5, "time/step_s": 2.0}
    for n in range(1, 21)
)


@pytest.fixture
def run(make_run):
    return make_run("soft_or", 0.5, {"a": 0.5, "b": 1.0}, steps=20, metrics=STEPS) / "soft_or-0.5-20-seed0"


def test_it_shows_evaluations_and_both_ends_of_every_number_and_nothing_of_the_papers(run, capsys):
    report_script.main(run)
    shown = capsys.readouterr().out
    table = (run / "report" / "table.md").read_text()
    # Medians of two steps each: of 4/1 and 4/2 3.0, of 4/19 and 4/20 0.205; lowest 0.2, highest 4.
    assert "| loss, nats per token trained on | 3.000 | 0.205 | 0.200 | 4.000 |" in table
    assert (
        "| before training | 25.0 |" in table and "| after step 20 | 75.0 |" in table and "| teacher | 100.0 |" in table
    )
    assert "| truncated answers | 50.0% |" in table
    page = (run / "report" / "report.html").read_text()
    words = re.sub(r"data:image[^\"]+", "", page.partition("</style>")[2])
    for text in (shown, table, words):
        assert "paper" not in text and "reward" not in text and "Q1" not in text  # neither was logged
    assert "data:image/" in page and "20 of 20 steps" in shown


def test_a_run_that_is_not_finished_has_one_too(make_run, capsys):
    folder = make_run("all", 1.0, {"a": 0.5}, steps=20, done=False, metrics=STEPS[:3])
    report_script.main(folder / "all-1.0-20-seed0")
    assert "3 of 20 steps, not finished" in capsys.readouterr().out


def test_a_folder_of_runs_without_a_table_is_one_line(run):
    with pytest.raises(UserError, match=r"is not a run folder \(it has no config.json\); [^\n]+ give --table"):
        report_script.main(run.parent)
    (run / "config.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="is not a run's configuration"):
        report_script.main(run)
