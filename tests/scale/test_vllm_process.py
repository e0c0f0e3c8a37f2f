"""vLLM in a process of its own: it says what transformers says, takes new weights, and no fault of it goes unsaid."""

import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pair, vllm_model
from vllm_settings import vllm_settings

from opsd.config import EngineConfig, OptimConfig, RolloutConfig
from opsd.engine import TorchEngine
from opsd.model.loading import load_scorer, load_tokenizer
from opsd.rollout import HFRollout
from opsd.types import Prompt, Sampling
from opsd.utils.errors import RunStopped

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
PROMPTS = [Prompt(str(k), "", [5 + k, 6, 7], None) for k in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """student/ and teacher/: random, small, of a shape that vLLM takes."""
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    folder = tmp_path_factory.mktemp("models")
    tiny_pair(folder, vllm_model)
    return folder


@pytest.fixture(scope="module")
def engine(models):
    return TorchEngine(load_scorer(str(models / "student"), "--student", torch.float32, CPU), EngineConfig(),
                       OptimConfig(), CPU)  # fmt: skip


@pytest.fixture(scope="module")
def vllm(models, engine):
    from opsd.rollout.vllm_process import VLLMProcessRollout

    settings = RolloutConfig(engine="vllm_process", generate_batch=8, timeout_s=600)
    tokenizer = load_tokenizer(str(models / "student"), "--student")
    path = str(models / "student")
    return VLLMProcessRollout(engine, settings, vllm_settings(path, tokenizer, engine, settings))


def transformers_says(engine, models):
    tokenizer = load_tokenizer(str(models / "student"), "--student")
    return ids_of(HFRollout(engine.student.model, tokenizer, 8).generate(PROMPTS, 2, GREEDY, seed=0))


def ids_of(rollouts):
    return [(rollout.id, rollout.prompt.id, rollout.response_ids, rollout.truncated) for rollout in rollouts]


def disturb(engine, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in engine.student.model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))


def test_it_says_what_transformers_says_before_and_after_new_weights(models, engine, vllm, monkeypatch):
    monkeypatch.setattr("opsd.rollout.vllm_process.BUCKET_BYTES", 20_000)  # several buckets even here
    before = ids_of(vllm.generate(PROMPTS, 2, GREEDY, seed=0))
    assert before == transformers_says(engine, models)
    disturb(engine, 1)
    vllm.sync()
    after = ids_of(vllm.generate(PROMPTS, 2, GREEDY, seed=0))
    assert after == transformers_says(engine, models) != before


def test_one_that_missed_the_new_weights_is_caught(engine, vllm, monkeypatch):
    vllm.generate(PROMPTS, 1, GREEDY, seed=0)  # the probe's tokens
    disturb(engine, 2)
    with monkeypatch.context() as stale:
        stale.setattr(vllm, "_load_weights", lambda: None)
        with pytest.raises(RunStopped, match=r"differ from the trainer's by .* nats per token on a probe"):
            vllm.sync()
    vllm.sync()


def test_a_signal_to_end_is_the_trainers_affair(models, engine, vllm):
    # Launchers send SIGTERM to every process of a run: the trainer finishes the part of its step first.
    before = ids_of(vllm.generate(PROMPTS, 2, GREEDY, seed=0))
    vllm._samplers[0]._process.terminate()
    assert ids_of(vllm.generate(PROMPTS, 2, GREEDY, seed=0)) == before


def test_one_that_hangs_is_ended_and_said_so(vllm, monkeypatch):
    monkeypatch.setattr("opsd.utils.going_on._from", "--resume RUN")
    (sampler,) = vllm._samplers
    sampler._timeout_s = 2.0
    os.kill(sampler._process.pid, signal.SIGSTOP)
    with pytest.raises(RunStopped, match=r"gave no answer in 2 s \(--rollout.timeout_s\) and was ended; continue with"):
        vllm.generate(PROMPTS, 1, GREEDY, seed=0)
    assert sampler._process.poll() == -signal.SIGKILL
