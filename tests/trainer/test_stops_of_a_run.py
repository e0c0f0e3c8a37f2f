"""Whole runs of tiny models that end with different tokens, that are cut off, and that are stopped for their health."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import CHAT_TEMPLATE, build_tokenizer, tiny_pair
from transformers import AutoModelForCausalLM, GenerationConfig

from opsd.build.stops import compare_templates
from opsd.config import from_json
from opsd.data.prompts import load_prompts
from opsd.data.rendering import PromptFormat
from opsd.data.template import Clock
from opsd.run.folder import RunFolder
from opsd.train import resume, start
from opsd.utils.errors import RunStopped, UserError

pytestmark = pytest.mark.e2e
# Every other token ends the teacher's turn: its random answers, and the student's, are short.
OFTEN = list(range(4, 49, 2))


@pytest.fixture
def settings(tmp_path):
    """A run of three steps; ends: of the teacher. Parts are given by dotted name."""
    pair = tiny_pair(tmp_path)

    def make(out="run", ends=None, **overrides):
        if ends is not None:
            GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path / "teacher")
        values = pair | {
            "out": str(tmp_path / out),
            "steps": 3,
            "prompts_per_step": 4,
            "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 12},
            "engine": {"device": "cpu", "micro_batch_tokens": 40},
            "optim": {"lr": 1e-3},
            "telemetry": {"every": 1, "save_rollouts_every": 1},
        }
        for name, value in overrides.items():
            part, _, key = name.partition("__")
            values[part] = {**values.get(part, {}), key: value} if key else value
        return from_json(values)

    return make


def lines(config):
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def responses(config, step=1):
    file = Path(config.out) / "rollouts" / f"step_{step}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(config):
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in lines(config)]


def test_a_pair_that_ends_differently_stops_at_either_in_training_and_evaluation(settings, capsys, tmp_path):
    config = settings(ends=OFTEN, eval__suite=[f"sums={tmp_path / 'sums.jsonl'}"], eval__samples=2)
    start(config)
    said = capsys.readouterr().err
    assert said.count("stops: the student ends with <eos>, the teacher with ") == 1
    assert "which the loss merges into one token" in said
    kept = json.loads((Path(config.out) / "config.json").read_text())["began"]["stops"]
    assert kept["student"] == [1]
    assert kept["teacher"] == [*OFTEN, 1]
    assert kept["stops"] == {"ids": [1, *OFTEN], "joined": True}
    for record in responses(config):
        *before, last = record["response_ids"]
        assert not set(before) & {1, *OFTEN}
        assert record["truncated"] == (last not in {1, *OFTEN})
    metrics = lines(config)[1:]
    assert all(line["rollout/truncated_frac"] < 0.2 for line in metrics)
    assert all(0 < line["stop/student_prob"] <= 1 and line["stop/kept_frac"] == 1 for line in metrics)
    assert all("stop/score_percentile_soft_or" in line for line in metrics)
    for name in ("teacher", "step_0", "step_3"):
        suite = json.loads((Path(config.out) / "eval" / f"{name}.json").read_text())["suites"]["sums"]
        assert suite["truncated_frac"] < 0.2
        assert suite["mean_tokens"] < 6
    # Whatever samples from a checkpoint stops there too.
    saved = GenerationConfig.from_pretrained(Path(config.out) / "checkpoints" / "step_3")
    assert saved.eos_token_id == [1, *OFTEN]


def test_a_resumed_run_keeps_its_stops_and_its_numbers(settings, tmp_path):
    whole = settings("whole", ends=OFTEN, checkpoint={"every": 1, "keep": 3})
    start(whole)
    part = settings("part", checkpoint={"every": 1, "keep": 3}, health="stop")
    start(part)
    folder = Path(part.out)
    (folder / "DONE").unlink()
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    resume(folder)
    assert numbers(part) == numbers(whole)


def test_a_folder_of_an_earlier_version_goes_on_where_its_student_ends(settings, tmp_path):
    """It knows of no stops: its rollouts end with <eos> alone, whatever the teacher ends with."""
    config = settings(ends=OFTEN, rollout__stop_tokens=["<eos>"], checkpoint__every=1)
    start(config)
    folder = Path(config.out)
    expected = numbers(config)
    values = json.loads((folder / "config.json").read_text())
    del values["began"]["stops"], values["rollout"]["stop_tokens"], values["health"], values["select"]["stop_token"]
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_3")
    resume(folder)
    assert numbers(config) == expected
    assert RunFolder.open(folder).began.stops is None


def test_a_teacher_that_names_no_end_is_refused_before_anything_is_written(settings, tmp_path, make_folder, make_model):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = tmp_path / "teacher" / name
        settings()
        values = json.loads(file.read_text())
        values = {key: value for key, value in values.items() if key not in ("eos_token_id", "eos_token")}
        file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="--teacher: it names no end token, so training would remove the student's"):
        start(settings())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHAT_TEMPLATE, None),
        (
            CHAT_TEMPLATE.replace("<assistant>", "<user>"),
            "chat templates differ on 2 of 2 prompts, both models use",
        ),
        ("{{ messages[0]['content'] }}{{ raise_exception('no system message') }}", "(no system message)"),
        (None, "the tokenizer has no chat template"),
    ],
)
def test_the_teachers_template_is_rendered_on_the_prompts_and_compared(tmp_path, template, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    ours, theirs, how = build_tokenizer(), build_tokenizer(), PromptFormat()
    theirs.chat_template = template
    prompts, _ = load_prompts(file, ours, how)
    found = compare_templates(prompts, str(file), ours, theirs, how, Clock())
    assert (found == []) if said is None else (len(found) == 1 and said in found[0] and "\n" not in found[0])


def test_stops_are_learnt_when_the_rule_says_so(settings):
    """By hand: what is trained on is the rule's choice, with the stops, or without them."""
    kept = {}
    for how in ("as_scored", "always", "never"):
        config = settings(how, ends=OFTEN, steps=1, select__by="entropy", select__retention=0.5, select__stop_token=how)
        start(config)
        (kept[how],) = lines(config)
    count, tokens = kept["always"]["stop/count"], kept["always"]["rollout/tokens"]
    scored = kept["as_scored"]["select/kept_frac"] * tokens
    among = kept["as_scored"]["stop/kept_frac"] * count
    assert 0 < among < count
    assert kept["always"]["select/kept_frac"] * tokens == pytest.approx(scored + count - among)
    assert kept["never"]["select/kept_frac"] * tokens == pytest.approx(scored - among)
    assert (kept["always"]["stop/kept_frac"], kept["never"]["stop/kept_frac"]) == (1, 0)


def test_without_a_rule_never_leaves_the_stops_out_of_every_micro_batch(settings):
    config = settings(ends=OFTEN, steps=1, select__stop_token="never", engine__micro_batch_tokens=15)
    start(config)
    (line,) = lines(config)
    assert line["batch/micro_batches"] > 1
    left = line["rollout/tokens"] - line["stop/count"]
    assert line["select/kept_frac"] * line["rollout/tokens"] == pytest.approx(left)


def test_truncated_rollouts_are_left_out_or_cut_and_counted(settings):
    found = {}
    for how in ("keep", "drop", "mask_tail"):
        config = settings(how, ends=OFTEN[::3], steps=1, rollout__truncated=how, rollout__max_new_tokens=4)
        start(config)
        (found[how],) = lines(config)
        records = responses(config)
    cut = [len(record["response_ids"]) for record in records if record["truncated"]]
    assert 0 < len(cut) < len(records)
    assert "rollout/left_out" not in found["keep"]
    assert (found["drop"]["rollout/left_out"], found["drop"]["rollout/left_out_tokens"]) == (len(cut), sum(cut))
    # A tenth of four tokens, rounded up.
    assert (found["mask_tail"]["rollout/left_out"], found["mask_tail"]["rollout/left_out_tokens"]) == (0, len(cut))
    assert found["drop"]["loss/nats"] != found["keep"]["loss/nats"] != found["mask_tail"]["loss/nats"]


def test_health_stop_saves_and_ends_and_the_run_goes_on_from_there(settings, capsys):
    config = settings(ends=[1], steps=7, health="stop", checkpoint__every=0, rollout__max_new_tokens=3)
    with pytest.raises(RunStopped, match=r"step 5: stopped by --health stop, .*step_5 is saved; continue with: "):
        start(config)
    said = capsys.readouterr().err
    assert "step 5: health: " in said
    assert "--rollout.stop_tokens" in said
    assert [line["step"] for line in lines(config)] == [1, 2, 3, 4, 5]
    assert lines(config)[-1]["health/truncation"] == 1
    assert not (Path(config.out) / "DONE").exists()
    resume(Path(config.out))
    assert (Path(config.out) / "DONE").exists()
    assert [line["step"] for line in lines(config)] == [1, 2, 3, 4, 5, 6, 7]
    assert "health: " not in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(Path(config.out) / "checkpoints" / "step_7")
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
