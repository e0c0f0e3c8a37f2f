"""Evaluations before training: shared by runs whose ingredients are all the same, and by no others."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pair

import opsd
from opsd.build import assemble
from opsd.config import from_json
from opsd.environments.travel.talk import TravelPrompt
from opsd.environments.travel.task import TravelTask
from opsd.eval import cache as evalcache
from opsd.eval.cache import Entry, entry_of, jobs_of
from opsd.eval.evaluator import Evaluator
from opsd.run.folder import RunFolder
from opsd.train import resume, start
from opsd.utils.distributed import ONE_RANK
from opsd.utils.errors import UserError


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict:
    """A tiny pair whose prompts serve as a suite too; one step."""
    folder = tmp_path_factory.mktemp("pair")
    return {
        **tiny_pair(folder),
        "steps": 1,
        "prompts_per_step": 2,
        "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 4},
        "engine": {"device": "cpu"},
        "telemetry": {"every": 0},
        "eval": {"suite": [f"sums={folder / 'sums.jsonl'}"], "samples": 2, "grader": "suffix"},
    }


def settings_of(pair: dict, folder: Path, out="run", **changes):
    """The pair's settings, with changes such as eval={"seed": 2}; runs lie in `folder`, their cache beside them."""
    values = {**pair, "out": str(folder / out), **changes}
    for part in ("eval", "rollout", "engine"):
        values[part] = {**pair[part], **changes.get(part, {})}
    values["eval"] = {"cache": str(folder / "evaluations"), **values["eval"]}
    return from_json(values)


@pytest.fixture
def settings(pair, tmp_path):
    """See settings_of; in tmp_path."""
    return functools.partial(settings_of, pair, tmp_path)


@pytest.fixture(scope="module")
def base(pair, tmp_path_factory) -> dict[str, str]:
    """The keys of the pair's evaluations without a change."""
    return keys(settings_of(pair, tmp_path_factory.mktemp("base")))


@pytest.fixture
def evaluated(monkeypatch) -> list:
    """The models that are evaluated, in order, as (model, step)."""
    seen, run = [], Evaluator.run

    def note(self, engine, model, step):
        seen.append((Path(model).name, step))
        return run(self, engine, model, step)

    monkeypatch.setattr(Evaluator, "run", note)
    return seen


TEACHER, STUDENT, AFTER = ("teacher", None), ("student", 0), ("student", 1)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in lines]


def evaluation(run: Path, name: str) -> dict:
    return json.loads((run / "eval" / f"{name}.json").read_text())


def keys(config) -> dict[str, str]:
    """For each evaluation before training the name of its file in the cache, or why it is not shared."""
    models = assemble(config, ONE_RANK).models()
    entries = {job.who: entry_of(models, config, job, Path("cache")) for job in jobs_of(models, config)}
    return {who: entry.file.name if isinstance(entry, Entry) else entry for who, entry in entries.items()}


def test_a_second_cell_evaluates_after_training_alone_and_has_the_numbers_of_a_run_without_a_cache(
    settings, evaluated, tmp_path
):
    start(settings("first"))
    start(settings("second", select={"by": "entropy", "retention": 0.5}, seed=3))
    assert evaluated == [TEACHER, STUDENT, AFTER, AFTER]
    start(settings("alone", eval={"cache": None}, select={"by": "entropy", "retention": 0.5}, seed=3))
    assert metrics(tmp_path / "second") == metrics(tmp_path / "alone")
    for name in ("teacher", "step_0"):
        shared, alone = evaluation(tmp_path / "second", name), evaluation(tmp_path / "alone", name)
        source = shared.pop("shared")
        assert shared == alone and "shared" not in alone
        assert Path(source["file"]).is_file() and source["computed_by"] == str(tmp_path / "first")
        assert evaluation(tmp_path / "first", name)["shared"] == source
    assert "shared" not in evaluation(tmp_path / "second", "step_1")


def test_cells_of_a_table_share_and_what_training_alone_reads_is_no_ingredient(settings, base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(settings().student, copy)
    assert base["teacher"].startswith("teacher-") and base["student"].startswith("student-")
    for changed in (
        settings("other", seed=7, steps=2, prompts_per_step=1),
        settings(select={"by": "soft_or", "retention": 0.2}, loss={"divergence": "jsd"}, optim={"lr": 1e-3}),
        settings(eval={"every": 1, "cache": str(tmp_path / "elsewhere")}, checkpoint={"every": 1}),
        settings(student=str(copy)),
    ):
        assert keys(changed) == base


CHANGES = {
    "temperature": {"eval": {"temperature": 0.7}},
    "top_p": {"eval": {"top_p": 0.9}},
    "top_k": {"eval": {"top_k": 5}},
    "samples": {"eval": {"samples": 3}},
    "length": {"eval": {"max_new_tokens": 5}},
    "the training's length, which evaluations take over": {"rollout": {"max_new_tokens": 5}},
    "seed": {"eval": {"seed": 2}},
    "grader": {"eval": {"grader": "math"}},
    "limit": {"eval": {"limit": 3}},
    "responses side by side": {"eval": {"generate_batch": 3}},
    "dtype": {"engine": {"dtype": "bfloat16"}},
    "thinking": {"prompt_format": "raw", "prompt_field": "answer"},
    "adapters": {"lora": {"rank": 2}},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_setting_is_another_key(settings, base, what):
    changed = keys(settings(**CHANGES[what]))
    assert not set(base.values()) & set(changed.values())


def test_the_sampler_is_part_of_the_key(settings):
    # By the settings alone: vLLM is slow to start.
    config = settings()
    models, (_, job) = assemble(config, ONE_RANK).models(), jobs_of(assemble(config, ONE_RANK).models(), config)
    other = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="vllm"))
    found = [entry_of(models, one, job, Path("cache")) for one in (config, other)]
    assert all(isinstance(entry, Entry) for entry in found) and found[0].file != found[1].file


def test_fresh_adapters_of_another_seed_are_another_student(settings):
    one, other = (keys(settings(lora={"rank": 2}, seed=seed)) for seed in (0, 1))
    assert one["teacher"] == other["teacher"] and one["student"] != other["student"]


def changed_copy(folder: str, to: Path, change) -> str:
    shutil.copytree(folder, to)
    change(to)
    return str(to)


def one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] += 2**-20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_json(name: str, **values):
    def change(folder: Path) -> None:
        there = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**there, **values}))

    return change


@pytest.mark.parametrize(
    "change",
    [one_weight, in_json("config.json", rms_norm_eps=1e-5), None],
    ids=["a weight", "config.json", "generation_config.json"],
)
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_another_model_is_another_key_of_its_own_evaluation(settings, base, tmp_path, who, change):
    other_ends = change is None
    change = change or in_json("generation_config.json", eos_token_id=[1, 2])
    config = settings()
    folder = config.student if who == "student" else config.teacher.model
    copy = changed_copy(folder, tmp_path / "copy", change)
    changed = settings(**({"student": copy} if who == "student" else {"teacher": {"model": copy}}))
    other = keys(changed)
    assert base[who] != other[who]
    # One weight of the student is nothing to the teacher; its configuration may be, as its tokenizer's is.
    # What the teacher ends with ends the student's answers too.
    assert who == "student" or other_ends or base["student"] == other["student"]


def test_the_students_tokenizer_is_part_of_the_teachers_key(settings, base, tmp_path):
    change = in_json("tokenizer_config.json", clean_up_tokenization_spaces=True)
    copy = changed_copy(settings().student, tmp_path / "copy", change)
    other = keys(settings(student=copy))
    assert base["teacher"] != other["teacher"] and base["student"] != other["student"]


@pytest.mark.e2e
@pytest.mark.parametrize("field", ["prompt", "answer", "id"])
def test_one_record_of_a_suite_is_part_of_the_key_wherever_the_file_lies(settings, base, tmp_path, field):
    records = [json.loads(line) for line in Path(settings().prompts).read_text().splitlines()]

    def suite(name: str, records: list[dict]) -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return f"sums={file}"

    assert keys(settings(eval={"suite": [suite("same.jsonl", records)]})) == base
    records[3] = {**records[3], field: "77"}
    changed = keys(settings(eval={"suite": [suite("changed.jsonl", records)]}))
    assert not set(base.values()) & set(changed.values())


def test_a_suites_name_is_part_of_the_key_because_its_draws_hang_on_it(settings, base):
    named = keys(settings(eval={"suite": [f"other={settings().prompts}"]}))
    assert not set(named.values()) & set(base.values())


def test_versions_code_processor_and_threads_are_part_of_the_key(settings, monkeypatch):
    config = settings()
    models = assemble(config, ONE_RANK).models()
    job = jobs_of(models, config)[0]

    def key() -> Path:
        entry = entry_of(models, config, job, Path("cache"))
        assert isinstance(entry, Entry)
        return entry.file

    found = [key()]
    with monkeypatch.context() as patch:
        version = evalcache.importlib.metadata.version
        patch.setattr(evalcache.importlib.metadata, "version", lambda name: version(name) + "1" * (name == "torch"))
        found.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
        found.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        found.append(key())
    with monkeypatch.context() as patch:
        checksums_of = evalcache.checksums_of
        patch.setattr(
            evalcache,
            "checksums_of",
            lambda folder, **how: checksums_of(folder, **how) | ({"x.py": "1"} if "only" in how else {}),
        )
        found.append(key())
    more = dataclasses.replace(models, ranks=SimpleNamespace(world_size=2))
    entry = entry_of(more, config, job, Path("cache"))
    assert isinstance(entry, Entry)
    assert len({*found, entry.file}) == len(found) + 1 and key() == found[0]


def test_the_code_that_is_part_of_the_key_is_the_whole_trainers(settings, monkeypatch):
    config, folders = settings(), []
    models = assemble(config, ONE_RANK).models()
    checksums_of = evalcache.checksums_of
    monkeypatch.setattr(
        evalcache,
        "checksums_of",
        lambda folder, **how: folders.append(folder) or checksums_of(folder, **how),
    )
    entry_of(models, config, jobs_of(models, config)[0], Path("cache"))
    assert Path(opsd.__file__).parent in folders


def test_a_trips_tables_are_part_of_its_content():
    task = TravelTask("1", "en", "Go", {"days": 1}, given={"trains": [{"price": "10"}]})
    dearer = dataclasses.replace(task, given={"trains": [{"price": "11"}]})
    one, same, other = (
        TravelPrompt("1", "Go", [1, 2], "{}", trip) for trip in (task, dataclasses.replace(task), dearer)
    )
    assert one.content() == same.content() != other.content()
    assert json.loads(json.dumps(one.content())) == one.content()


@pytest.mark.e2e
def test_what_is_not_known_by_its_files_is_not_shared(settings, tmp_path, evaluated, capsys):
    adapter = changed_copy(
        settings().teacher.model, tmp_path / "adapter", lambda at: (at / "adapter_config.json").write_text("{}")
    )
    code = changed_copy(
        settings().teacher.model, tmp_path / "code", in_json("config.json", auto_map={"AutoConfig": "a.B"})
    )
    config = settings()
    models = assemble(config, ONE_RANK).models()
    job = jobs_of(models, config)[0]
    for model, reason in (
        (adapter, "is an adapter on another model"),
        (code, "comes with its own code (auto_map"),
        ("a/b", "not found"),
    ):
        entry = entry_of(models, config, dataclasses.replace(job, model=model), Path("cache"))
        assert isinstance(entry, str) and reason in entry
    for out in ("one", "two"):
        start(settings(out, eval={"grader": "operator:eq"}))
    assert evaluated == [TEACHER, STUDENT, AFTER] * 2
    said = capsys.readouterr().err
    assert said.count("the grader operator:eq is not part of opsd and may change") == 4
    assert not list((tmp_path / "evaluations").iterdir())


def test_a_hub_name_is_known_by_the_files_in_the_hubs_cache(settings, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, local_files_only):
        asked.append((name, local_files_only))
        return settings().teacher.model

    monkeypatch.setattr(evalcache, "snapshot_download", snapshot)
    config = settings()
    models = assemble(config, ONE_RANK).models()
    job = jobs_of(models, config)[0]
    found = [entry_of(models, config, dataclasses.replace(job, model=model), Path("c")) for model in (job.model, "a/b")]
    assert found[0] == found[1] and asked == [("a/b", True)]


@pytest.mark.e2e
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "altered"])
def test_a_damaged_file_is_made_again_and_that_is_said(settings, tmp_path, evaluated, capsys, damage):
    start(settings("first"))
    (file,) = (tmp_path / "evaluations").glob("teacher-*.json")
    whole = file.read_text()
    stored = json.loads(whole)
    stored["result"]["suites"]["sums"]["mean@k"] = 0.75
    file.write_text({"cut": whole[:-40], "empty": "", "other": "[1]", "altered": json.dumps(stored)}[damage])
    start(settings("second"))
    assert evaluated == [TEACHER, STUDENT, AFTER, TEACHER, AFTER]
    assert f"{file} is damaged: the teacher will be evaluated again" in capsys.readouterr().err.splitlines()
    again = json.loads(file.read_text())
    assert again["computed_by"] == str(tmp_path / "second") and again["result"] == json.loads(whole)["result"]
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")


HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.e2e
@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_what_another_run_makes_is_waited_for_last_and_made_here_if_that_run_dies(
    settings, tmp_path, evaluated, monkeypatch, end
):
    start(settings("first"))
    (file,) = (tmp_path / "evaluations").glob("teacher-*.json")
    (student,) = (tmp_path / "evaluations").glob("student-*.json")
    made = file.read_text()
    file.unlink()
    student.unlink()
    evaluated.clear()
    other = subprocess.Popen([sys.executable, "-c", HOLD, file.with_suffix(".lock")], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(list(evaluated))
        if len(waits) == 2:
            if end == "finishes":
                file.write_text(made)
            other.kill()
            other.wait()

    monkeypatch.setattr(evalcache, "time", SimpleNamespace(sleep=sleep))
    start(settings("second"))
    other.stdout.close()
    # The student's came first; the teacher's was looked for until the other process had ended.
    assert waits == [[STUDENT]] * 2
    assert evaluated == ([STUDENT, AFTER] if end == "finishes" else [STUDENT, TEACHER, AFTER])
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")


def test_a_lock_is_free_again_when_an_evaluation_fails(settings, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "run", fail)
        with pytest.raises(KeyboardInterrupt):
            start(settings())
    locks = list((tmp_path / "evaluations").glob("*.lock"))
    assert len(locks) == 1 and not list((tmp_path / "evaluations").glob("*.json"))
    with FileLock(locks[0], timeout=0):
        pass


@pytest.mark.e2e
def test_a_run_that_has_its_teachers_evaluation_takes_it_on_resume(settings, tmp_path, evaluated):
    config = settings(eval={"cache": None})
    run = RunFolder.create(config)
    start(dataclasses.replace(config, out=str(tmp_path / "other")))
    evaluated.clear()
    teacher = evaluation(tmp_path / "other", "teacher")
    run.write_eval("teacher", {**teacher, "mark": "kept"})
    resume(run.path)
    assert evaluated == [STUDENT, AFTER]
    assert evaluation(run.path, "teacher")["mark"] == "kept"


@pytest.mark.parametrize("cache", ["", "{tmp}/file", "{tmp}/file/below", "/proc/none", "/sys/kernel"])
def test_a_cache_that_cannot_be_written_is_bad_input_before_anything_is(settings, tmp_path, cache):
    (tmp_path / "file").write_text("")
    cache = cache.format(tmp=tmp_path)
    with pytest.raises(
        UserError, match=rf"^--eval.cache '{cache}' cannot be written [^\n]+; give another folder, or None$"
    ):
        start(settings(eval={"cache": cache}))
    assert not (tmp_path / "run").exists()


@pytest.mark.e2e
def test_a_folder_in_the_place_of_a_shared_evaluation_is_named(settings, tmp_path):
    config = settings(eval={"cache": str(tmp_path / "cache")})
    start(config)
    (entry, *_) = sorted((tmp_path / "cache").glob("teacher-*.json"))
    entry.unlink()
    entry.mkdir()
    with pytest.raises(UserError, match=r"teacher-.*\.json is a folder, not an evaluation file; remove it$"):
        start(dataclasses.replace(config, out=str(tmp_path / "other")))
