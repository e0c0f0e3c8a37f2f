"""The hub, against a stand-in on this machine: data sets as prompts, checkpoints as repositories with a model card."""

import json

import httpx
import huggingface_hub.constants
import pytest
from hub_stand_in import COMMIT, stand_in

from opsd.config import EvalConfig, SelectConfig, TeacherConfig, TrainConfig
from opsd.data.hub import HubPlace, pin
from opsd.data.prompts import read_records
from opsd.run.card import model_card
from opsd.run.folder import RunFolder
from opsd.run.push import PushConfig, push
from opsd.utils.errors import UserError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with stand_in() as hub:
        for name, value in (
            ("ENDPOINT", hub.address),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_OFFLINE", False),
        ):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "stand-in")
        yield hub


def records(*texts):
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts).encode()


def test_a_split_is_read_from_its_files_in_order_and_no_other(hub):
    hub.datasets["owner/sums"] = {
        "README.md": b"train",
        "data/train-00001-of-00002.jsonl": records("c"),
        "data/train-00000-of-00002.jsonl": records("a", "b"),
        "data/constrained.jsonl": records("x"),
        "data/test-00000-of-00001.jsonl": records("y"),
    }
    assert [record["prompt"] for record in read_records("hub:owner/sums:train")] == ["a", "b", "c"]
    assert [record["prompt"] for record in read_records("hub:owner/sums:test")] == ["y"]


def test_a_configuration_is_a_word_of_the_files_names(hub):
    hub.datasets["owner/sums"] = {"main/train.jsonl": records("a"), "other/train.jsonl": records("b")}
    assert [record["prompt"] for record in read_records("hub:owner/sums:other:train")] == ["b"]


def test_a_place_is_pinned_to_its_commit_and_the_commit_is_what_is_read(hub):
    hub.datasets["owner/sums"] = {"train.jsonl": records("a")}
    pinned = pin("hub:owner/sums:train")
    assert pinned == f"hub:owner/sums:train@{COMMIT}" and pin(pinned) == pinned
    hub.datasets.clear()  # what is in the cache is not asked for again
    assert [record["prompt"] for record in read_records(pinned)] == ["a"]
    assert pin("data/train.jsonl") == "data/train.jsonl"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("hub:sums", "give hub:OWNER/NAME:SPLIT"),
        ("hub:owner/none:train", "dataset owner/none cannot be fetched"),
        ("hub:owner/sums:validation", "file of a split 'validation'"),
    ],
)
def test_what_is_not_there_is_one_line(hub, place, said):
    hub.datasets["owner/sums"] = {"train.jsonl": records("a")}
    with pytest.raises(UserError, match=rf"^[^\n]*{said}[^\n]*$"):
        HubPlace.files(HubPlace.of(place))


def config_of(out, **changes):
    return TrainConfig(
        student="owner/base", teacher=TeacherConfig(model="t|x"), prompts="p.jsonl", out=str(out), **changes
    )


SUITE = {"k": 4, "mean@k": 0.25, "stderr_problems": 0.05, "scores": {"0": 0.25}}
EVALUATION = {
    "model": "m",
    "step": 2,
    "sampling": {"temperature": 1.0, "samples": 4, "seed": 1},
    "suites": {"sums": SUITE},
}


def test_a_card_says_what_a_model_was_made_from_and_what_it_scores(tmp_path):
    config = config_of(
        tmp_path / "run",
        steps=2,
        select=SelectConfig(by="soft_or", retention=0.2),
        eval=EvalConfig(suite=("sums=s.jsonl",), grader="suffix"),
    )
    card = model_card(config, 2, {"step_2": EVALUATION, "teacher": EVALUATION})
    head, text = card.removeprefix("---\n").split("\n---\n", 1)
    import yaml

    data = yaml.safe_load(head)
    assert data["base_model"] == "owner/base" and data["library_name"] == "transformers"
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "sums" and result["metrics"] == [{"type": "mean@4", "value": 0.25}]
    for said in (
        "soft_or, 20 % of each answer",
        "| this model | 25.0 ± 5.0 |",
        "Sampled with temperature 1.0, samples 4; graded by suffix.",
        "--select.by soft_or --select.retention 0.2",
        r"`t\|x`",
        "2604.14084",
    ):
        assert said in text
    assert "Not evaluated." in model_card(config, 2, {})


@pytest.fixture
def run(tmp_path):
    """A run whose one checkpoint is whole by its checksums."""
    from opsd.run.disk import write_checksums

    run = RunFolder.create(config_of(tmp_path / "run", steps=2))
    place = run.checkpoints / "step_2"
    (place / "trainer").mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"weights")
    (place / "trainer" / "optimizer.safetensors").write_bytes(b"moments")
    write_checksums(place, place / "trainer" / "checksums.json")
    run.write_eval("step_2", EVALUATION)
    return run


def test_a_push_uploads_the_model_with_its_card_and_without_the_trainers_state(hub, run):
    address = push(PushConfig(run.path, "owner/name"))
    assert address == f"{hub.address}/owner/name/commit/{COMMIT}"
    (files,) = hub.uploaded.values()
    assert set(files) == {"model.safetensors", "README.md"} and files["model.safetensors"] == b"weights"
    assert b"| this model | 25.0" in files["README.md"]
    assert hub.made[0]["name"] == "name"


def test_a_card_is_no_damage_to_its_checkpoint(run):
    from opsd.run import checkpoint

    run.write_card(2)
    run.write_card(1)  # there is no such checkpoint any more
    assert checkpoint.newest(run.checkpoints) == (run.checkpoints / "step_2", [])


def test_what_the_hub_refuses_is_one_line(hub, run, tmp_path):
    hub.refuses = True
    with pytest.raises(UserError, match=r"^push to owner/name: [^\n]+hf auth login[^\n]+$"):
        push(PushConfig(run.path, "owner/name"))
    for name in ("name", "a/b/c", "owner/two words", "owner/-name", "/"):
        with pytest.raises(UserError, match="give OWNER/NAME"):
            push(PushConfig(run.path, name))
    empty = RunFolder.create(config_of(tmp_path / "empty"))
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        push(PushConfig(empty.path, "owner/name"))


def test_a_push_without_a_network_is_one_line(run, monkeypatch):
    def unreachable(*_, **__):
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr("opsd.run.push.HfApi.create_repo", unreachable)
    with pytest.raises(
        UserError, match=r"^push to owner/name: the hub cannot be reached \(Name or service not known\)$"
    ):
        push(PushConfig(run.path, "owner/name"))
