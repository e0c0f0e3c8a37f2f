"""Checkpoints: whole or not at all, loaded by transformers as they are, equal to the last bit."""

import errno
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.model.scorer import Scorer
from opsd.run import checkpoint
from opsd.run.checkpoint import TrainerState, load_state, newest, remove, save
from opsd.utils.errors import RunStopped, UserError


def state_of(step: int, **changes) -> TrainerState:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model.norm.weight/exp_avg": torch.randn(16, generator=generator),
        "model.norm.weight/step": torch.tensor(float(step)),
        # A transposed view, as an optimiser may hold one: it is not contiguous.
        "lm_head.weight/exp_avg_sq": torch.randn(5, 7, generator=generator).t(),
    }
    selector = {"histogram": [0.1, 1 / 3, 1e-300], "low": None}
    fields = {"optimizer_tensors": tensors, "selector": selector, **changes}
    return TrainerState(step, **fields)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def put(folder, make_model, tokenizer):
    """Saves step N of a model made from seed N."""

    def put(step: int, keep: int = 9):
        return save(folder, Scorer(make_model(seed=step)).model, tokenizer, state_of(step), keep)

    return put


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_a_model_folder_that_transformers_loads_as_it_is(folder, make_model, tokenizer, tied):
    model = Scorer(make_model("qwen3", tied)).model
    path = save(folder, model, tokenizer, state_of(1), keep=1)
    assert path == folder / "step_1"
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    again = AutoTokenizer.from_pretrained(path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template


def test_the_trainers_state_comes_back_to_the_last_bit(put):
    loaded, expected = load_state(put(3)), state_of(3)
    assert (loaded.step, loaded.selector) == (3, expected.selector)
    assert loaded.optimizer_tensors.keys() == expected.optimizer_tensors.keys()
    for name, tensor in expected.optimizer_tensors.items():
        assert torch.equal(loaded.optimizer_tensors[name], tensor)
        assert loaded.optimizer_tensors[name].dtype == tensor.dtype


def test_an_engine_that_has_not_stepped_yet_can_be_saved(folder, make_model, tokenizer):
    path = save(folder, make_model(), tokenizer, state_of(1, optimizer_tensors={}), keep=1)
    assert load_state(path).optimizer_tensors == {}


def test_the_newest_k_are_kept_by_number_not_by_name(put, folder):
    for step in (8, 9, 10, 11):
        put(step, keep=2)
    assert names(folder) == ["step_10", "step_11"]  # as text, step_9 would come last
    assert newest(folder) == (folder / "step_11", [])


@pytest.mark.parametrize("place", ["save_file", "write_checksums", "to_disk"])
def test_a_crash_in_the_middle_leaves_the_older_one_and_no_half(put, folder, monkeypatch, place):
    put(1, keep=1)
    calls = []

    def crash(*args, **kwargs):
        calls.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, place, crash)
        with pytest.raises(RunStopped, match=r"step_2 cannot be written \(No space left on device\)"):
            put(2, keep=1)
    assert calls
    assert names(folder) == ["step_1"]  # the half is cleared away: there was no room for it
    assert newest(folder) == (folder / "step_1", [])
    assert load_state(folder / "step_1").step == 1
    assert (put(2, keep=1), []) == newest(folder)


def test_a_half_that_a_kill_left_is_cleared_away(put, folder):
    whole = put(1)
    (folder / ".tmp-step_2").mkdir()
    assert newest(folder) == (whole, [])
    assert names(folder) == ["step_1"]


def test_a_half_written_checkpoint_of_the_same_step_is_written_anew(put, folder):
    (folder / ".tmp-step_2").mkdir(parents=True)
    (folder / ".tmp-step_2" / "junk").touch()
    assert "junk" not in names(put(2))


def test_a_crash_while_an_old_one_is_deleted_never_leaves_a_half_that_counts(put, folder, monkeypatch):
    put(1)

    def crash(path, *args, **kwargs):
        if path.exists():  # the deletion itself, not the clearing of a place that is free
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            remove(folder / "step_1")
    assert newest(folder) == (None, [])
    assert names(folder) == []


def test_there_may_be_no_checkpoint(tmp_path, folder):
    assert newest(folder) == (None, [])  # not even the folder
    (tmp_path / "step_5").touch()  # a file is none
    (tmp_path / "step_x").mkdir()
    assert newest(tmp_path) == (None, [])


def cut_tensors(path):
    file = path / "trainer" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


OTHER_FORM = {"step": 1, "optimizer": {"kind": "deepspeed"}, "selector": {}, "metrics": {}}


@pytest.mark.parametrize(
    "damage",
    [
        cut_tensors,
        lambda path: (path / "trainer" / "optimizer.safetensors").write_bytes(b""),
        lambda path: (path / "trainer" / "optimizer.safetensors").unlink(),
        lambda path: (path / "trainer" / "state.json").unlink(),
        lambda path: (path / "trainer" / "state.json").write_text('{"step": 1'),
        lambda path: (path / "trainer" / "state.json").write_text("[]"),
        lambda path: (path / "trainer" / "state.json").write_text(json.dumps({"step": 1, "optimizer": {}})),
        lambda path: (path / "trainer" / "state.json").write_text(json.dumps(OTHER_FORM)),
        lambda path: (path / "trainer" / "state.json").write_bytes(b"\xff"),
    ],
)
def test_a_damaged_checkpoint_gives_one_line_with_its_path(put, damage):
    path = put(1)
    damage(path)
    with pytest.raises(UserError, match=rf"^checkpoint {path} cannot be read \([^\n]+\); remove it [^\n]+$"):
        load_state(path)


def test_what_is_put_aside_never_counts_and_nobody_removes_it(put, folder):
    put(1), put(2)
    cut_tensors(folder / "step_2")
    assert newest(folder)[0] == folder / "step_1"
    put(2, keep=1)
    assert names(folder) == ["damaged-step_2", "step_2"]
    assert newest(folder) == (folder / "step_2", [])


def test_a_folder_of_everything_lost_gives_no_checkpoint_and_a_line_for_each(put, folder):
    for step in (1, 2):
        shutil.rmtree(put(step) / "trainer")
    path, skipped = newest(folder)
    assert path is None and len(skipped) == 2
    assert [aside.name for aside in checkpoint.damaged(folder)] == ["damaged-step_1", "damaged-step_2"]
