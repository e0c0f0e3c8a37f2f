"""wandb, as far as it goes without a network: how runs are grouped, what is summed up, the table, the workspace."""

import importlib
import json
import os
import re
import struct
from pathlib import Path

import pytest
from forked import python

from opsd.config import from_json
from opsd.run import wandb_run
from opsd.run.folder import RunFolder
from opsd.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def config_of(out, **select):
    return from_json(
        {
            "student": "models/Qwen3-4B/",
            "teacher": {"model": "Qwen/Qwen3-8B"},
            "prompts": "p.jsonl",
            "out": str(out),
            "seed": 3,
            "steps": 3,
            "select": select,
            "track": {"wandb": "offline", "progress": False},
        }
    )


def write_rollouts(file, count):
    record = {"prompt_id": "p", "response_ids": [1, 2], "answer": None, "text": "<b>4</b>", "reward": None}
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({"id": n, "truncated": False, **record}) + "\n" for n in range(count)))


def test_a_run_is_labelled_by_recipe_pair_selector_and_seed(tmp_path):
    folder = tmp_path / "table5" / "qwen3-soft_or-20-seed3"
    found = wandb_run.labels(config_of(folder, by="soft_or", retention=0.2), folder)
    assert found == {"recipe": "table5", "pair": "Qwen3-8B to Qwen3-4B", "selector": "soft_or-20", "seed": "seed-3"}
    assert wandb_run.labels(config_of(folder, by="all"), folder)["selector"] == "all"


def test_the_seeds_of_a_cell_share_a_group_and_cells_do_not(tmp_path, monkeypatch):
    import wandb

    started = []

    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings))
    for name, kept in (("a", 0.2), ("b", 0.2), ("c", 0.5)):
        wandb_run.start(config_of(tmp_path / name, by="soft_or", retention=kept), tmp_path / "table5" / name, "offline")
    first, second, other = started
    assert first["group"] == second["group"] == "table5 · Qwen3-8B to Qwen3-4B · soft_or-20" != other["group"]
    assert first["id"] != second["id"]
    assert set(first["tags"]) == {"table5", "Qwen3-8B to Qwen3-4B", "soft_or-20", "seed-3"}
    assert (first["job_type"], first["mode"]) == ("soft_or-20", "offline")
    assert (first["config"]["retention"], first["config"]["select"]["retention"]) == (0.2, 0.2)


def test_names_are_cut_to_what_wandb_takes(tmp_path, monkeypatch):
    import wandb

    started = []
    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings))
    folder = tmp_path / ("r" * 100) / "run"
    wandb_run.start(config_of(folder, by="my:" + "s" * 100), folder, "online")
    assert max(map(len, started[0]["tags"])) == 64 and len(started[0]["group"]) == 128


def test_a_summary_is_what_a_run_comes_to(tmp_path):
    lines = [
        {"step": 0, "eval/aime24/mean@16": 0.25, "teacher_eval/aime24/mean@16": 1.0},
        {"step": 1, "mem/peak_gib": 2.0, "time/step_s": 3.0, "rollout/tokens": 100, "select/kept_frac": 0.5},
        {"step": 2, "mem/peak_gib": 4.0, "time/step_s": 1.0, "rollout/tokens": 50, "eval/aime24/mean@16": 0.75},
        {"step": 3, "eval/aime24/mean@16": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert wandb_run.summary(tmp_path / "metrics.jsonl") == {
        "summary/peak_gib": 4.0,
        "summary/mean_step_s": 2.0,
        "summary/tokens": 150,
        "summary/kept_frac": 0.5,
        "summary/aime24/final": 0.5,
        "summary/aime24/best": 0.75,
        "summary/aime24/gain": 0.25,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[3]) + "\n")  # not evaluated before training: no gain
    assert set(wandb_run.summary(tmp_path / "metrics.jsonl")) == {"summary/aime24/final", "summary/aime24/best"}
    assert wandb_run.summary(tmp_path / "absent.jsonl") == {}


def test_the_table_holds_a_few_rollouts_spread_evenly(tmp_path):
    write_rollouts(tmp_path / "step_2.jsonl", 64)
    table = wandb_run.sample_table(tmp_path / "step_2.jsonl", 2)
    assert table.columns == ["step", "id", "prompt", "answer", "text", "reward", "truncated", "tokens"]
    assert [row[1] for row in table.data] == list(range(0, 64, 4))
    assert table.data[0] == [2, 0, "p", None, "<b>4</b>", None, False, 2]
    write_rollouts(tmp_path / "few.jsonl", 3)
    assert len(wandb_run.sample_table(tmp_path / "few.jsonl", 2).data) == 3
    assert wandb_run.sample_table(tmp_path / "absent.jsonl", 2) is None


# A process of its own: wandb reads its settings once and leaves a service behind.
OFFLINE = """
import sys
from pathlib import Path
from opsd.run.folder import RunFolder
from opsd.run.tracking import Tracker

with Tracker(RunFolder.open(Path(sys.argv[1])), 0) as tracker:
    for step, peak, score in ((1, 2.0, 0.5), (2, 3.0, 0.25)):
        tracker.step({"step": step, "mem/peak_gib": peak, "eval/aime24/mean@16": score})
"""


def records_of(log):
    """What an offline run would send: its log's records. Blocks of 32 KiB; each piece has checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, place, record, found = log.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(pb.Record.FromString(record))
            record = b""
    return found


@pytest.mark.e2e
def test_an_offline_run_carries_group_tags_summaries_and_the_table(tmp_path):
    folder = tmp_path / "table5" / "run"
    run = RunFolder.create(config_of(folder, by="soft_or", retention=0.2))
    write_rollouts(run.path / "rollouts" / "step_2.jsonl", 4)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    done = python("-c", OFFLINE, run.path, env=environment)
    assert done.returncode == 0, done.stderr
    records = records_of(next(run.path.glob("wandb/offline-run-*/*.wandb")))
    sent = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert sent.run_group == "table5 · Qwen3-8B to Qwen3-4B · soft_or-20" and sent.job_type == "soft_or-20"
    assert "seed-3" in sent.tags
    summed = {"/".join(u.nested_key) or u.key: u.value_json for r in records for u in r.summary.update}
    assert (summed["summary/peak_gib"], summed["summary/aime24/best"]) == ("3.0", "0.5")
    items = [item for record in records for item in record.history.item]
    table = {i.nested_key[1]: json.loads(i.value_json) for i in items if i.nested_key[:1] == ["rollout/samples"]}
    assert table["_type"] == "table-file" and table["nrows"] == 4
    file = next(run.path.glob("wandb/offline-run-*/files")) / table["path"]
    assert json.loads(file.read_text())["data"][0][4] == "<b>4</b>"


@pytest.fixture(scope="module")
def wandb_dashboard():
    """The script; its libraries take a second to import, and every worker collects this file."""
    return importlib.import_module("wandb_dashboard")


def shown(wandb_dashboard, capsys, **options):
    wandb_dashboard.main("team", dry_run=True, **options)
    return json.loads(capsys.readouterr().out)


def test_the_workspace_groups_by_cell_and_opens_accuracy_and_memory(wandb_dashboard, capsys):
    built = shown(wandb_dashboard, capsys, suites=("pocket",), samples=4)
    section = built["spec"]["section"]
    named = {bank["name"]: bank for bank in section["panelBankConfig"]["sections"]}
    assert list(named)[:2] == ["Accuracy", "Memory"]
    assert [name for name, bank in named.items() if bank["isOpen"]] == ["Accuracy", "Memory"]
    assert all(
        bank["panels"]
        for name, bank in named.items()
        if name in ("Accuracy", "Memory", "Training", "Selection", "Health")
    )
    grouping = [key["name"] for key in section["runSets"][0]["grouping"]]
    assert grouping == ["recipe.value", "pair.value", "selector.value"]
    assert {"eval/pocket/mean@4", "summary:summary/pocket/final"} <= set(
        re.findall(r'"([^"]+)"', json.dumps(named["Accuracy"]))
    )
    assert "summary/peak_gib" in json.dumps(named["Memory"])


def test_every_metric_of_the_workspace_is_one_that_the_trainer_logs(wandb_dashboard):
    from wandb_workspaces.reports.v2 import LinePlot

    built = wandb_dashboard.workspace("team", "opsd", "view", (), 16)
    shown = set()
    for section in built.sections:
        for panel in section.panels:
            if isinstance(panel, LinePlot):
                shown |= {metric for metric in panel.y if isinstance(metric, str)}
    assert len(shown) > 20
    root = Path(wandb_run.__file__).parents[2]
    source = "".join(file.read_text() for part in ("opsd", "tip_patch") for file in (root / part).rglob("*.py"))
    # Means of the rollouts that were rewarded, and of those that were not.
    for name in (re.sub("_(un)?rewarded$", "", name) for name in shown):
        prefix, _, rest = name.partition("/")
        made = rest[3:] if prefix == "quadrant" else rest
        known = f'"{name}"' in source or (prefix in ("quadrant", "time") and made.removesuffix("_s") in source)
        assert known, f"{name} is on the dashboard, but nothing logs it"


def test_without_its_library_the_dashboard_says_what_to_install(wandb_dashboard, monkeypatch):
    monkeypatch.setattr(wandb_dashboard, "ws", None)
    with pytest.raises(UserError, match="pip install wandb-workspaces"):
        wandb_dashboard.main("team", dry_run=True)
