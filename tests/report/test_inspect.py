"""`opsd inspect`: what stands in the page, which tokens are picked, what is refused. In a browser: test_browser.py."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
from token_runs import HOSTILE, WORDS

from opsd import __main__ as cli
from opsd.utils.errors import UserError
from opsd.viewer.command import InspectConfig, inspect
from opsd.viewer.examples import pick
from opsd.viewer.labels import Label
from opsd.viewer.page import embed
from opsd.viewer.texts import Texts
from tip_patch.quadrants import QUADRANT_LABELS

ROOT = Path(__file__).parents[2]


def data_of(file: Path):
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(), re.S)[1])


def test_the_command_writes_one_file_and_prints_its_path(token_run, monkeypatch, capsys):
    run = token_run()
    monkeypatch.setattr(sys, "argv", ["opsd", "inspect", str(run)])
    cli.main()
    out = run / "inspect_step_20.html"
    assert capsys.readouterr().out == f"{out}\n"
    assert out.stat().st_size > 10_000


def test_the_page_holds_every_rollout_as_it_was_recorded(token_run, tmp_path):
    data = data_of(inspect(InspectConfig(token_run(), out=tmp_path / "page.html")))
    assert (data["run"], data["step"], data["steps"]) == ("token-run", 20, 40)
    assert (data["student"], data["selector"]) == ("student-model", "soft_or, 50 % kept")
    assert data["labels"][0]["splits"] == {"entropy": 0.5, "divergence": 1.0}
    assert len(data["rollouts"]) == 4 and data["left_out"] == 0
    second = data["rollouts"][1]
    # rows 6 … 11: ids 6 … 10, 0; h (n mod 5)/4; δ n mod 4; kept where n is even
    assert [data["texts"][i] for i in second["ids"]] == [*WORDS[6:], WORDS[0]]
    assert second["h"] == [0.25, 0.5, 0.75, 1, 0, 0.25]
    assert second["r"] == [2, 3, 0, 1, 2, 3] and second["f"] == [1, 1.5, 0, 0.5, 1, 1.5]
    assert second["k"] == [1, 0, 1, 0, 1, 0]
    assert (second["prompt"], second["answer"], second["reward"]) == ("2+2=", "4", 1.0)
    # likeliest first, and a log-probability of −inf is null: JSON has no other word for it
    assert [data["texts"][i] for i in second["s"][0]] == WORDS[6:11]
    assert second["sp"][0] == [-0.6931, -1.386, -2.079, -2.773, None] and second["o"][0] is None


def test_quadrant_shares_are_those_of_the_record(token_run, tmp_path):
    run = token_run(rollouts=10, length=2)  # 20 rows: every pair of h and δ once
    shares = data_of(inspect(InspectConfig(run, out=tmp_path / "page.html")))["labels"][0]["values"]
    # h > 0.5 in 2 of 5, δ > 1 in 2 of 4: Q1 0.2, Q2 0.2, Q3 0.3, Q4 0.3; Σδ is 5·(0+1+2+3) = 30, Q1 holds 2·(2+3)
    assert [share["tokens"] for share in shares] == [0.2, 0.2, 0.3, 0.3]
    assert shares[0]["loss"] == pytest.approx(10 / 30)
    assert sum(share["loss"] for share in shares) == pytest.approx(1)


def test_quadrants_have_words_where_the_splits_were_asked_for_in_nats_and_numbers_elsewhere(token_run, tmp_path):
    run = token_run()
    file = run / "config.json"
    config = json.loads(file.read_text())
    for options, third in (
        (config["telemetry"]["options"], "sure, teacher disagrees"),
        ({"entropy_split": "median", "divergence_split": "mean"}, "h ≤ 0.5, δ > 1 nats"),
        ({}, "h ≤ 0.5, δ > 1 nats"),  # an older run's: its splits are not today's default
        ({"entropy_split": "0.5", "divergence_split": "1.0", "gone": "3"}, "sure, teacher disagrees"),
    ):
        file.write_text(json.dumps({**config, "telemetry": {"options": options}}))
        labels = data_of(inspect(InspectConfig(run, out=tmp_path / "page.html")))["labels"][0]["values"]
        assert labels[2]["what"] == third


def test_a_label_that_no_telemetry_knows_is_shown_by_its_numbers(token_run, tmp_path):
    run = token_run()
    file = run / "tokens" / "step_20.parquet"
    table = pd.read_parquet(file).drop(columns="quadrant")
    table.assign(parity=table["position"] % 2).to_parquet(file)
    data = data_of(inspect(InspectConfig(run, out=tmp_path / "page.html")))
    (labels,) = data["labels"]
    assert [(label["name"], label["tokens"]) for label in labels["values"]] == [("parity 0", 0.5), ("parity 1", 0.5)]
    assert data["rollouts"][0]["label parity"] == [0, 1, 0, 1, 0, 1]
    assert [example["kind"] for example in data["examples"]] == ["left_out"]


def test_a_label_column_has_the_names_colours_and_examples_that_its_telemetry_gives(token_run, tmp_path, monkeypatch):
    class Halves:
        labels: ClassVar[dict] = {
            "half": (
                Label(0, "early", "in the first half", "#123456"),
                Label(1, "late", "in the second half", "#654321", clearest={"entropy": 1}, examples=2),
            )
        }

    monkeypatch.setattr("opsd.viewer.labels.load_telemetry", lambda _: [Halves(), object()])
    run = token_run()
    file = run / "tokens" / "step_20.parquet"
    table = pd.read_parquet(file)
    table.assign(half=table["position"] // 3).to_parquet(file)
    data = data_of(inspect(InspectConfig(run, out=tmp_path / "page.html")))
    quadrants, halves = data["labels"]
    assert [label["name"] for label in quadrants["values"]] == [f"quadrant {number}" for number in (1, 2, 3, 4)]
    assert [(label["name"], label["colour"]) for label in halves["values"]] == [
        ("early", "#123456"),
        ("late", "#654321"),
    ]
    # the second halves' highest entropy is 1, of rows 4, 9 and 14: 4 and 9 come first
    late = [(e["rollout"], e["row"]) for e in data["examples"] if e["kind"] == "half 1"]
    assert late == [(0, 4), (1, 3)]


def test_no_text_of_a_model_can_end_the_element_it_stands_in(token_run, tmp_path):
    page = inspect(InspectConfig(token_run(), out=tmp_path / "page.html")).read_text()
    assert HOSTILE in data_of(tmp_path / "page.html")["texts"]
    # two of the page's own, and none of the rollouts'
    assert len(re.findall(r"<script", page)) == 2 and "<img" not in page and HOSTILE not in page
    assert "<b>8B" not in page


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "&lt;", "\u2028", "\ud800", 'quote " \\ \x00'])
def test_embedded_text_reads_back_and_holds_no_markup(text):
    found = embed({"text": text})
    assert not set("<>&") & set(found)
    assert json.loads(found)["text"] == text.encode("utf-8", "replace").decode()


def test_nothing_in_the_page_asks_the_network(token_run, tmp_path):
    page = inspect(InspectConfig(token_run(), out=tmp_path / "page.html")).read_text()
    assert "default-src 'none'" in page
    own = re.sub(r'id="data">.*?</script>', "", page, flags=re.S)
    assert not re.findall(r"https?://|@import|url\(|<link|src=", own)


def test_a_run_without_rollout_files_still_shows_its_tokens(token_run, tmp_path):
    data = data_of(inspect(InspectConfig(token_run(written=False, top=False), out=tmp_path / "page.html")))
    assert "prompt" not in data["rollouts"][0] and "s" not in data["rollouts"][0]
    assert [data["texts"][i] for i in data["rollouts"][0]["ids"]] == WORDS[:6]


def test_tokens_of_tools_are_shown_without_numbers(token_run, tmp_path):
    run = token_run()
    file = run / "tokens" / "step_20.parquet"
    table = pd.read_parquet(file)
    table[~((table["rollout"] == 0) & table["position"].isin([1, 2]))].to_parquet(file)
    first = data_of(inspect(InspectConfig(run, out=tmp_path / "page.html")))["rollouts"][0]
    assert len(first["ids"]) == 6
    assert first["at"] == [0, 3, 4, 5] and len(first["h"]) == 4


def test_whole_rollouts_are_left_out_past_the_limits_and_counted(token_run, tmp_path):
    run, out = token_run(), tmp_path / "page.html"
    data = data_of(inspect(InspectConfig(run, out=out, rollouts=3)))
    assert (len(data["rollouts"]), data["left_out"]) == (3, 1)
    data = data_of(inspect(InspectConfig(run, out=out, tokens=13)))  # two rollouts are 12 tokens
    assert (len(data["rollouts"]), data["left_out"]) == (2, 2)
    data = data_of(inspect(InspectConfig(run, out=out, tokens=1)))  # never an empty page
    assert (len(data["rollouts"]), data["left_out"]) == (1, 3)


def test_the_last_recorded_step_is_shown_unless_one_is_named(token_run, tmp_path):
    run = token_run(steps=(20, 100, 9))
    assert inspect(InspectConfig(run)).name == "inspect_step_100.html"
    assert data_of(inspect(InspectConfig(run, step=9)))["step"] == 9


def test_half_characters_and_lost_spaces_are_spelled_out():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    # "é" is two bytes, Ã and © in a byte-level vocabulary; "Ġso" is " so"; nothing has id 9
    inner = Tokenizer(models.WordLevel({"Ã": 0, "©": 1, "Ġso": 2, "Ċ": 3}, unk_token="Ã"))
    inner.decoder = decoders.ByteLevel()
    texts = Texts(PreTrainedTokenizerFast(tokenizer_object=inner))
    assert [texts.number(token) for token in (0, 1, 2, 3, 9, 0)] == [0, 1, 2, 3, 4, 0]
    assert texts.all() == ["Ã", "©", " so", "\n", "⟨9⟩"]
    assert texts.whole([0, 1, 2]) == "é so"
    pieces = Tokenizer(models.WordLevel({"▁so": 0}, unk_token="▁so"))
    pieces.decoder = decoders.Metaspace()
    texts = Texts(PreTrainedTokenizerFast(tokenizer_object=pieces))
    texts.number(0)
    assert texts.all() == [" so"]


LABELS = {"quadrant": QUADRANT_LABELS}


def rows(*values):
    """(rollout, token, h, δ, quadrant, kept)"""
    names = ["rollout", "token_id", "entropy", "reverse_kl", "quadrant", "kept"]
    return pd.DataFrame(values, columns=names)


def test_the_clearest_token_of_each_kind_is_picked():
    table = rows(
        (3, 1, 0.0, 0.0, 4, True),  # the most solved
        (3, 2, 0.1, 9.0, 3, False),  # δ̂·(1 − ĥ) = 0.9·0.9, the clearest Q3, and left out of training
        (3, 3, 0.3, 10.0, 3, True),  # 1·0.7
        (8, 4, 1.0, 0.1, 2, True),  # 1·0.99
        (8, 5, 0.9, 5.0, 1, True),  # 0.45
        (8, 6, 0.8, 8.0, 1, True),  # 0.64, the clearer one
    )
    found = [(e["kind"], e["rollout"], e["row"]) for e in pick(table, [{"id": 3}, {"id": 8}], LABELS)]
    assert found == [
        ("quadrant 3", 0, 1),
        ("quadrant 3", 0, 2),
        ("quadrant 1", 1, 2),
        ("quadrant 1", 1, 1),
        ("quadrant 2", 1, 0),
        ("quadrant 4", 0, 0),
        ("left_out", 0, 1),
    ]


def test_examples_of_a_kind_differ_and_are_at_most_three():
    same = [(0, 7, 0.0, 9.0, 3, True)] * 4
    others = [(0, token, 0.0, 8.0, 3, True) for token in (1, 2, 3)]
    found = pick(rows(*same, *others), [{"id": 0}], LABELS)
    assert [(e["kind"], e["row"]) for e in found] == [("quadrant 3", 0), ("quadrant 3", 4), ("quadrant 3", 5)]


def test_rollouts_of_one_prompt_do_not_fill_the_examples():
    # the same place thrice, another token sampled each time; the fourth is less clear, but new
    table = rows(*[(0, token, 0.0, 9.0, 3, True) for token in (1, 2, 3)], (0, 4, 0.0, 8.0, 3, True))
    table["student_top_ids"] = [[1, 2], [1, 2], [1, 2], [5, 6]]
    table["teacher_top_ids"] = [[7, 1], [7, 1], [7, 1], [7, 1]]
    assert [(e["kind"], e["row"]) for e in pick(table, [{"id": 0}], LABELS)] == [("quadrant 3", 0), ("quadrant 3", 3)]


def test_nothing_is_picked_where_nothing_was_recorded_or_left_out():
    assert pick(rows(), [], LABELS) == []
    all_kept = pick(rows((0, 1, 0.5, 1.0, 1, True)), [{"id": 0}], LABELS)
    assert [e["kind"] for e in all_kept] == ["quadrant 1"]


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda run: (run / "config.json").unlink(), {}, "no run there (config.json is missing)"),
        (lambda run: (run / "config.json").write_text("{"), {}, "config.json is not JSON"),
        (lambda run: (run / "config.json").write_text("{}"), {}, "is not a run's configuration"),
        (lambda run: (run / "tokens" / "step_20.parquet").unlink(), {}, "--telemetry.save_tokens True"),
        (lambda run: (run / "tokens" / "step_20.parquet").write_text("x"), {}, "step_20.parquet cannot be read"),
        (lambda run: (run / "rollouts" / "step_20.jsonl").write_text("x"), {}, "step_20.jsonl is not JSON"),
        (lambda run: None, {"step": 3}, "--step 3 is not recorded in"),
        (lambda run: None, {"rollouts": 0}, "--rollouts 0: give a number above 0"),
        (lambda run: None, {"out": Path("/nowhere/at/all.html")}, "--out /nowhere/at/all.html cannot be written"),
    ],
)
def test_unusable_input_is_one_line(token_run, change, options, said):
    run = token_run()
    change(run)
    with pytest.raises(UserError) as stop:
        inspect(InspectConfig(run, **options))
    assert said in str(stop.value) and "\n" not in str(stop.value)


def test_inspecting_leaves_a_running_runs_files_alone(token_run):
    run = token_run()
    half = run / "checkpoints" / ".tmp-step_5"
    half.mkdir(parents=True)
    before = sorted(path for path in run.rglob("*"))
    out = inspect(InspectConfig(run))
    assert sorted(path for path in run.rglob("*") if path != out) == before


@pytest.mark.e2e
def test_an_installed_package_brings_the_pages_files(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    subprocess.run(command, cwd=copy, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True).stdout
    for name in ("viewer.html", "viewer.css", "viewer.js", "viewer_token.js"):
        assert f"opsd/viewer/{name}" in names


def test_the_token_that_ends_a_turn_is_marked(token_run, tmp_path):
    run = token_run()
    assert data_of(inspect(InspectConfig(run, out=tmp_path / "old.html")))["rollouts"][0].get("end") is None
    file = run / "tokens" / "step_20.parquet"
    table = pd.read_parquet(file)
    table.assign(stop=table["position"] == 5).to_parquet(file, index=False)
    page = inspect(InspectConfig(run, out=tmp_path / "page.html"))
    assert [rollout["end"] for rollout in data_of(page)["rollouts"]] == [[5]] * 4
    assert "ends the turn" in page.read_text()
