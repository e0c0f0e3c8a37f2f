"""Settings that cannot work together are the user's line, before anything is loaded."""

import pytest

from opsd.build.sampler import check_rollout
from opsd.config import EngineConfig, EvalConfig, RolloutConfig, TeacherConfig, TrainConfig
from opsd.engine import check_engine
from opsd.utils.errors import UserError


def settings(teacher=None, **parts):
    return TrainConfig(student="s", teacher=TeacherConfig("t", **(teacher or {})), prompts="p", out="o", **parts)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: {"engine": EngineConfig(offload_optimizer=True)},
            "offload_optimizer True needs --engine.kind deepspeed",
        ),
        (
            lambda: {"engine": EngineConfig(kind="deepspeed", zero_stage=0, offload_optimizer=True)},
            "offload_optimizer True needs .* --engine.zero_stage 1 to 3",
        ),
        (
            lambda: {"engine": EngineConfig(kind="deepspeed", zero_stage=2, offload_parameters=True)},
            "offload_parameters True needs .* --engine.zero_stage 3",
        ),
        (lambda: {"teacher": {"shard": True}}, "shard True needs .* --engine.kind deepspeed"),
        (lambda: {"teacher": {"kind": "vllm", "urls": ()}}, "names no server"),
        (lambda: {"teacher": {"kind": "vllm"}, "eval": EvalConfig(suite=("a=b",))}, "give --eval.teacher False"),
        (lambda: {"teacher": {"timeout_s": 0.0}}, "--teacher.timeout_s 0.0: give a number above 0"),
        (lambda: {"teacher": {"retries": -1}}, "--teacher.retries -1: give 0 or more"),
        (lambda: {"rollout": RolloutConfig(gpu_memory_share=1.0)}, "gpu_memory_share 1.0: give a fraction between"),
        (lambda: {"rollout": RolloutConfig(probe_tolerance=0.0)}, "probe_tolerance 0.0: give a number above 0"),
        (lambda: {"rollout": RolloutConfig(tensor_parallel=0)}, "tensor_parallel 0: give a number above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        settings(**wrong())


def test_a_served_teacher_and_a_sharded_one_are_accepted():
    settings({"kind": "vllm"}, eval=EvalConfig(suite=("a=b",), teacher=False))
    settings({"shard": True}, engine=EngineConfig(kind="deepspeed"))


def test_the_torch_engine_is_one_process(monkeypatch):
    check_engine(settings())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"torch is one process, but 2 were started; give --engine.kind deepspeed"):
        check_engine(settings())


@pytest.mark.e2e
def test_a_sampler_takes_a_number_of_ranks_that_divides_theirs(monkeypatch):
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_rollout(RolloutConfig(engine="vllm", tensor_parallel=2))
    with pytest.raises(UserError, match="tensor_parallel 3 does not divide the 4 processes"):
        check_rollout(RolloutConfig(engine="vllm", tensor_parallel=3))
