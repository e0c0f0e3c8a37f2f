"""Settings that cannot work together are the user's line, before anything is loaded."""

import pytest

from opsd.build import check_rollout
from opsd.config import EngineConfig, EvalConfig, RolloutConfig, TeacherConfig, TrainConfig
from opsd.engine import check_engine
from opsd.teacher.base import check_logit_settings
from opsd.teacher.vllm import read_head
from opsd.utils.errors import UserError


def settings(teacher=None, **parts):
    return TrainConfig(student="s", teacher=TeacherConfig("t", **(teacher or {})), prompts="p", out="o", **parts)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"engine": EngineConfig(offload_optimizer=True)}, "offload_optimizer True needs --engine.kind deepspeed"),
        (
            {"engine": EngineConfig(kind="deepspeed", zero_stage=0, offload_optimizer=True)},
            "offload_optimizer True needs .* --engine.zero_stage 1 to 3",
        ),
        (
            {"engine": EngineConfig(kind="deepspeed", zero_stage=2, offload_parameters=True)},
            "offload_parameters True needs .* --engine.zero_stage 3",
        ),
        ({"teacher": {"shard": True}}, "shard True needs .* --engine.kind deepspeed"),
        ({"teacher": {"kind": "vllm", "urls": ()}}, "names no server"),
        ({"teacher": {"kind": "vllm"}, "eval": EvalConfig(suite=("a=b",))}, "give --eval.teacher False"),
        ({"teacher": {"timeout_s": 0.0}}, "--teacher.timeout_s 0.0: give a number above 0"),
        ({"teacher": {"retries": -1}}, "--teacher.retries -1: give 0 or more"),
        ({"rollout": RolloutConfig(gpu_memory_share=1.0)}, "gpu_memory_share 1.0: give a fraction between"),
        ({"rollout": RolloutConfig(probe_tolerance=0.0)}, "probe_tolerance 0.0: give a number above 0"),
        ({"rollout": RolloutConfig(tensor_parallel=0)}, "tensor_parallel 0: give a number above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        settings(**wrong)


def test_a_served_teacher_and_a_sharded_one_are_accepted():
    settings({"kind": "vllm"}, eval=EvalConfig(suite=("a=b",), teacher=False))
    settings({"shard": True}, engine=EngineConfig(kind="deepspeed"))


def test_the_torch_engine_is_one_process(monkeypatch):
    check_engine(settings())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"torch is one process, 2 were started; give --engine.kind deepspeed"):
        check_engine(settings())


def test_a_sampler_takes_a_number_of_ranks_that_divides_theirs(monkeypatch):
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_rollout(RolloutConfig(engine="vllm", tensor_parallel=2))
    with pytest.raises(UserError, match="tensor_parallel 3 does not divide the 4 processes"):
        check_rollout(RolloutConfig(engine="vllm", tensor_parallel=3))


def test_a_teacher_with_bent_logits_or_without_a_head_is_refused(tmp_path):
    check_logit_settings({"final_logit_softcapping": None, "logit_scale": 1.0}, "t")
    with pytest.raises(UserError, match=r"--teacher t: its config.json sets final_logit_softcapping"):
        check_logit_settings({"final_logit_softcapping": 30.0}, "t")
    with pytest.raises(UserError, match=r"no config\.json there"):
        read_head(str(tmp_path), None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no lm_head or embed_tokens weight"):
        read_head(str(tmp_path), None)
