"""A local teacher that makes room: when its model is moved, and where its states wait."""

import runpy
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from opsd.data.packing import empty, pack
from opsd.model.scorer import Scorer
from opsd.teacher import LocalTeacher

WORKER = runpy.run_path(str(Path(__file__).with_name("worker.py")))
CPU, DEVICE = torch.device("cpu"), torch.device("cpu", 0)  # equal in what they do, told apart by name


@pytest.fixture
def batches():
    return pack(WORKER["rollouts"](), 16)


def places(scorer):
    return {name: parameter.data_ptr() for name, parameter in scorer.named_parameters()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_offloaded_model_is_on_the_device_while_it_computes_only_and_its_one_host_copy_stays(batches, tied):
    plain = LocalTeacher(Scorer(tiny_model(tied, 1)), CPU).hidden(batches)
    scorer = Scorer(tiny_model(tied, 1))
    head = scorer.head.weight.data_ptr()
    teacher = LocalTeacher(scorer, DEVICE, offload=True)
    host = places(scorer)
    for _ in range(2):
        with teacher.present():
            device = places(scorer)
        assert places(scorer) == host  # nothing was copied back
        for name in host:
            assert (host[name] == device[name]) == (host[name] == head), name
    states = teacher.hidden(batches)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, plain, strict=True))
    with pytest.raises(ValueError, match="within"), teacher.present():
        raise ValueError("within")
    assert places(scorer) == host  # it leaves after an error too


@pytest.mark.parametrize("offload", [False, True])
def test_the_head_is_the_models_own_and_stays_where_it_is(offload):
    scorer = Scorer(tiny_model(False, 1))
    before = scorer.head.weight.data_ptr()
    head = LocalTeacher(scorer, DEVICE, offload).head_for(empty()).weight_VD
    assert head.data_ptr() == scorer.head.weight.data_ptr() == before


@pytest.mark.gpu
def test_on_a_gpu_the_states_wait_in_pinned_host_memory(batches):
    scorer = Scorer(tiny_model(True, 1))
    (first, *_) = LocalTeacher(scorer.cuda(), torch.device("cuda"), offload=True, cache="host").hidden(batches)
    assert first.device.type == "cpu" and first.is_pinned()
    moved = next(p for p in scorer.parameters() if p is not scorer.head.weight)
    assert moved.device.type == "cpu" and moved.is_pinned() and scorer.head.weight.is_cuda
