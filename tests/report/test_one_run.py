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


def test_a_run_without_a_step_is_one_line_that_says_how_to_go_on(make_run):
    folder = make_run("all", 1.0, {"a": 0.5}, steps=20, done=False) / "all-1.0-20-seed0"
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"has trained no step yet; continue with opsd train --resume "):
        report_script.main(folder)


def test_a_pages_title_stands_once_and_q1_to_q4_are_said_with_their_splits(make_run, capsys):
    shares = {f"quadrant/q{q}_frac": 0.25 for q in (1, 2, 3, 4)}
    splits = [{"quadrant/entropy_split_nats": h, "quadrant/divergence_split_nats": 0.25} for h in (0.5, 0.125)]
    lines = tuple({"step": n, **shares, **of} for n, of in enumerate(splits, start=1))
    run = make_run("all", 1.0, {"a": 0.5}, metrics=lines) / "all-1.0-2-seed0"
    report_script.main(run)
    said = " ".join(capsys.readouterr().out.split())
    assert "entropy (split at 0.125 to 0.5 nats) and the divergence from the teacher (at 0.25 nats): Q1 above" in said
    body = (run / "report" / "report.html").read_text().partition("<body")[2]
    assert body.count("all-1.0-2-seed0: 2 of 2 steps") == 1 and "<h2>" not in body


def test_of_a_run_that_was_made_elsewhere_only_what_is_known_is_shown(run, capsys):
    values = {"student": "record/s", "teacher": {"model": "t"}, "prompts": "", "steps": 20, "seed": 3, "out": "record"}
    values |= {"select": {"by": "soft_or", "retention": 0.5}, "optim": {"lr": 0.01}}
    (run / "config.json").write_text(json.dumps(values))
    report_script.main(run)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("•")]
    assert lines == ["• student record/s, teacher t", "• soft_or 50 %; learning rate 0.01; seed 3"]


def test_a_folder_of_runs_without_a_table_is_one_line(run):
    with pytest.raises(UserError, match=r"is not a run folder \(it has no config.json\); [^\n]+ give --table"):
        report_script.main(run.parent)
    (run / "config.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="is not a run's configuration"):
        report_script.main(run)
