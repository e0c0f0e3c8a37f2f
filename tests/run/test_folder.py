"""The run folder: never written into another run, and cut back to a checkpoint without doubling a line."""

import json

import pandas as pd
import pytest

from opsd.config import SelectConfig, TeacherConfig, TrainConfig
from opsd.run.folder import RunFolder
from opsd.utils import going_on, signals
from opsd.utils.errors import UserError


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        student="s",
        teacher=TeacherConfig(model="t"),
        prompts="p.jsonl",
        out=str(tmp_path / "deep" / "run"),
        select=SelectConfig(by="soft_or", options={"sharpness": "2"}),
    )


@pytest.fixture
def run(config):
    return RunFolder.create(config)


def files(run):
    return sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())


def steps(run):
    return [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def fill(run, make_rollout, last):
    for step in range(last + 1):
        run.write_metrics({"step": step, "loss/nats": step / 7})
        run.write_eval(f"step_{step}", {"step": step})
        if step:
            run.write_rollouts(f"step_{step}", [make_rollout(0, [6], [7])], FakeTokenizer(), [1.0])
            run.write_tokens(step, pd.DataFrame({"step": [step, step], "kept": [True, False]}))
    run.write_eval("teacher", {"step": None})


class FakeTokenizer:
    def decode(self, ids):
        return "".join(chr(ord("a") + number) for number in ids)


def test_a_command_can_be_gone_on_with_once_there_is_a_run_folder(config, monkeypatch):
    monkeypatch.setattr(going_on, "_from", None)
    assert signals.interrupted() == "interrupted; start again, nothing was saved yet"
    run = RunFolder.create(config)
    assert signals.interrupted() == f"interrupted; continue with --resume {run.path}"


def test_a_new_run_writes_its_resolved_configuration_and_opens_again(run, config):
    assert files(run) == ["config.json"]
    values = json.loads((run.path / "config.json").read_text())
    assert values["select"]["options"] == {"sharpness": "2"}
    assert values["optim"]["lr"] == 1e-6  # defaults too
    assert RunFolder.open(run.path).config == config


def test_a_run_of_before_min_and_max_were_stated_goes_on_as_it_was(run):
    values = json.loads((run.path / "config.json").read_text())
    assert values["select"].pop("normalise_over") == "batch"
    (run.path / "config.json").write_text(json.dumps(values))
    assert RunFolder.open(run.path).config.select.normalise_over == "micro_batch"


def test_an_empty_folder_that_is_there_already_is_taken(config, tmp_path):
    (tmp_path / "deep" / "run").mkdir(parents=True)
    RunFolder.create(config)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("config.json", "holds a run already; give --resume"),
        ("notes.txt", "is not empty"),
        (".hidden", "is not empty"),
    ],
)
def test_a_folder_with_anything_in_it_is_refused_and_left_as_it_was(config, tmp_path, there, said):
    folder = tmp_path / "deep" / "run"
    folder.mkdir(parents=True)
    (folder / there).write_text("precious")
    with pytest.raises(UserError, match=rf"^--out {folder} {said}[^\n]+$"):
        RunFolder.create(config)
    assert [path.name for path in folder.iterdir()] == [there]
    assert (folder / there).read_text() == "precious"


def test_what_an_attempt_without_a_step_has_left_is_put_aside_and_nothing_is_lost(run, config, make_rollout):
    fill(run, make_rollout, 0)  # it was evaluated, then its first step failed
    run.write_rollouts("stopped_at_step_1", [make_rollout(0, [6], [7])], FakeTokenizer(), None)
    (run.path / "notes.txt").write_text("the user's own")
    left = set(files(run)) - {"notes.txt"}
    again = RunFolder.create(config)
    assert again.notes == (
        f"an earlier attempt ended before it finished a step: its files are in {run.path}/attempt_1",
    )
    assert set(files(again)) == {"config.json", "notes.txt", *(f"attempt_1/{name}" for name in left)}
    assert "attempt_2" in RunFolder.create(config).notes[0]


@pytest.mark.parametrize("sign", ["metrics", "checkpoint", "damaged", "finished", "cut"])
def test_a_run_that_trained_anything_is_not_begun_anew(run, config, sign):
    if sign == "metrics":
        run.write_metrics({"step": 0})
        run.write_metrics({"step": 1})
    elif sign in {"checkpoint", "damaged"}:
        (run.checkpoints / {"checkpoint": "step_1", "damaged": "damaged-step_1"}[sign]).mkdir(parents=True)
    elif sign == "finished":
        run.finish()
    else:
        (run.path / "metrics.jsonl").write_text('{"step": 1')
    before = files(run)
    with pytest.raises(UserError, match=r"holds a run already; give --resume"):
        RunFolder.create(config)
    assert files(run) == before


def test_a_run_that_another_process_trains_is_neither_begun_anew_nor_resumed(run, config):
    with run.alone():  # a lock belongs to who opened the folder: another process or, here, a second opening
        for act in (lambda: RunFolder.create(config), run.alone().__enter__):
            with pytest.raises(UserError, match="another process is training this run"):
                act()
    assert files(run) == ["config.json"]
    with run.alone():
        """It is free again."""


@pytest.mark.parametrize("place", ["deep", "deep/run"])
def test_a_file_in_the_way_is_refused(config, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    with pytest.raises(UserError, match=r"^--out [^\n]+(is a file|cannot be made)[^\n]+$"):
        RunFolder.create(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no run there"),
        ('{"student"', "config.json is not JSON"),
        ("[]", "config.json holds no settings"),
        ('{"student": "s"}', "prompts is missing"),
        ('{"student": "s", "teacher": "t", "prompts": "p", "out": "o"}', "teacher is 't', not a group"),
    ],
)
def test_opening_what_is_no_run_gives_one_line(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"^[^\n]*{said}[^\n]+$"):
        RunFolder.open(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ([] if text is None else ["config.json"])


def test_cutting_removes_what_is_past_a_step_and_nothing_else(run, make_rollout):
    fill(run, make_rollout, 12)
    before = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    run.cut_after(9)
    assert (run.path / "metrics.jsonl").read_text() == "".join(before[:10])  # steps 0 … 9, byte for byte
    kept = {f"rollouts/step_{step}.jsonl" for step in range(1, 10)} | {f"tokens/step_{s}.parquet" for s in range(1, 10)}
    kept |= {f"eval/step_{step}.json" for step in range(10)} | {"eval/teacher.json", "config.json", "metrics.jsonl"}
    assert set(files(run)) == kept


def test_cutting_everything_keeps_the_configuration_and_the_teachers_evaluation(run, make_rollout):
    fill(run, make_rollout, 2)
    run.cut_after(None)
    assert files(run) == ["config.json", "eval/teacher.json", "metrics.jsonl"]
    assert steps(run) == []


@pytest.mark.parametrize("half", ['{"step": 3, "loss/na', '{"step"', "{}", "[3]", "\n"])
def test_a_line_cut_short_by_a_kill_goes_and_the_next_one_is_whole(run, half):
    for step in (1, 2):
        run.write_metrics({"step": step})
    with (run.path / "metrics.jsonl").open("a") as lines:
        lines.write(half)
    run.cut_after(2)
    run.write_metrics({"step": 3})
    assert steps(run) == [1, 2, 3]


def test_cutting_a_run_that_wrote_nothing_yet_does_nothing(run):
    run.cut_after(None)
    run.cut_after(5)
    assert files(run) == ["config.json"]


def test_metrics_keep_every_bit(run):
    # a float's repr reads back to the same float
    run.write_metrics({"step": 1, "loss/nats": 0.1 + 0.2})
    assert json.loads((run.path / "metrics.jsonl").read_text())["loss/nats"] == 0.1 + 0.2


def test_a_rollout_is_written_with_ids_text_and_reward(run, make_rollout):
    rollouts = [
        make_rollout(0, [6, 7], [0, 1, 2], [True, False, True], answer="abc"),
        make_rollout(1, [8], [3], truncated=True, answer="x"),
    ]
    run.write_rollouts("step_4", rollouts, FakeTokenizer(), [1.0, 0.0])
    first, second = (json.loads(line) for line in (run.path / "rollouts" / "step_4.jsonl").read_text().splitlines())
    assert first == {
        "id": 0,
        "prompt_id": "0",
        "prompt_ids": [6, 7],
        "response_ids": [0, 1, 2],
        "student_mask": [True, False, True],
        "truncated": False,
        "text": "abc",
        "answer": "abc",
        "reward": 1.0,
    }
    assert (second["student_mask"], second["truncated"], second["reward"]) == (None, True, 0.0)
    run.write_rollouts("ungraded", rollouts, FakeTokenizer(), None)
    assert json.loads((run.path / "rollouts" / "ungraded.jsonl").read_text().splitlines()[0])["reward"] is None
    run.write_rollouts("none", [], FakeTokenizer(), None)
    assert (run.path / "rollouts" / "none.jsonl").read_text() == ""


def test_a_token_record_is_written_whole_and_under_its_step(run):
    table = pd.DataFrame({"entropy": [0.0, 0.5], "student_top_ids": [[3, 1], [2, 0]]})
    run.write_tokens(7, table)
    back = pd.read_parquet(run.path / "tokens" / "step_7.parquet")
    assert back["entropy"].tolist() == [0.0, 0.5]
    assert [list(ids) for ids in back["student_top_ids"]] == [[3, 1], [2, 0]]
    assert files(run) == ["config.json", "tokens/step_7.parquet"]


def test_evaluations_come_back_and_absent_ones_are_none(run):
    assert run.read_eval("step_0") is None
    run.write_eval("step_0", {"suites": {"aime": {"mean@k": 1 / 3}}})
    assert run.read_eval("step_0") == {"suites": {"aime": {"mean@k": 1 / 3}}}


def test_a_finished_run_says_so(run):
    assert not run.done
    run.finish()
    assert run.done
    assert RunFolder.open(run.path).done


def test_a_kill_while_a_file_is_replaced_leaves_the_old_one(run, monkeypatch):
    run.write_metrics({"step": 1})
    run.write_metrics({"step": 2})

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("opsd.run.disk.os.replace", kill)
    with pytest.raises(KeyboardInterrupt):
        run.cut_after(1)
    assert steps(run) == [1, 2]
