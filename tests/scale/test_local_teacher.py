"""A local teacher that makes room: when its model is moved, and where its states wait."""

import runpy
from pathlib import Path

import pytest
import torch

from opsd.batch import pack
from opsd.student import Scorer
from opsd.teacher import LocalTeacher

WORKER = runpy.run_path(str(Path(__file__).with_name("worker.py")))
CPU, DEVICE = torch.device("cpu"), torch.device("cpu", 0)  # equal in what they do, told apart by name


class Watched(Scorer):
    """Says where it was moved to."""

    def to(self, device):
        self.moves = [*getattr(self, "moves", []), device]
        return super().to(device)


@pytest.fixture
def batches():
    return pack(WORKER["rollouts"](), 16)


def test_an_offloaded_model_is_on_the_device_while_it_computes_only(batches):
    plain = LocalTeacher(Scorer(WORKER["model"](True, 1)), CPU).hidden(batches)
    scorer = Watched(WORKER["model"](True, 1))
    teacher = LocalTeacher(scorer, DEVICE, offload=True)
    assert scorer.moves == ["cpu"]
    states = teacher.hidden(batches)
    assert scorer.moves == ["cpu", DEVICE, "cpu"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, plain, strict=True))
    with pytest.raises(ValueError, match="within"), teacher.present():
        raise ValueError("within")
    assert scorer.moves[3:] == [DEVICE, "cpu"]  # it leaves after an error too


def test_an_offloaded_models_head_stays_on_the_device_as_a_copy():
    scorer = Scorer(WORKER["model"](True, 1))
    head = LocalTeacher(scorer, DEVICE, offload=True).head()
    assert torch.equal(head, scorer.head.weight)
    assert head.data_ptr() != scorer.head.weight.data_ptr()
    assert LocalTeacher(scorer, DEVICE).head().data_ptr() == scorer.head.weight.data_ptr()


@pytest.mark.gpu
def test_on_a_gpu_the_states_wait_in_pinned_host_memory(batches):
    scorer = Scorer(WORKER["model"](True, 1))
    (first, *_) = LocalTeacher(scorer.cuda(), torch.device("cuda"), offload=True, cache="host").hidden(batches)
    assert first.device.type == "cpu" and first.is_pinned()
    assert next(scorer.parameters()).device.type == "cpu"
