"""scripts/figures.py: what there is is drawn, what is missing is named."""

import pytest

import figures
from opsd.utils.errors import UserError

ALL = {"a": 0.5, "b": 0.5, "c": 0.75, "d": 0.25}


@pytest.mark.e2e
def test_a_figure_whose_runs_are_there_is_drawn_and_the_others_name_their_target(make_run, tmp_path, capsys):
    folder = make_run("all", 1.0, ALL)
    folder.rename(tmp_path / "table5")
    figures.main(tmp_path, tmp_path / "out")
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "figure1.png").read_bytes().startswith(b"\x89PNG")
    assert "Figure 1. Accuracy by rule." in (tmp_path / "out" / "figures.html").read_text()
    # one rule at one retention, no recorded tokens, no planning runs
    for line in ("Figure 2: no finished run in table5", "make sweep-retention makes them", "make table7 makes them"):
        assert line in said
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["figure1.png", "figures.html"]


def test_a_folder_without_finished_runs_is_one_line(make_run, tmp_path):
    make_run("all", 1.0, ALL, done=False).rename(tmp_path / "table5")
    with pytest.raises(UserError, match="holds no finished runs"):
        figures.main(tmp_path, tmp_path / "out")
