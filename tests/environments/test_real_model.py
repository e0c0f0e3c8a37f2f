"""Episodes of a real model with its own chat template: it need not plan well, the loop must hold.

Every third of its layers is enough for that: its prompts of 2,000 tokens are what takes time.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_settings import vllm_settings

from opsd.config import EngineConfig, OptimConfig, RolloutConfig
from opsd.engine import TorchEngine
from opsd.environments.travel import TravelEnv, generate_tasks
from opsd.environments.travel.talk import Talk
from opsd.model.loading import load_scorer
from opsd.rollout import HFRollout
from opsd.rollout.agent import AgentRollout
from opsd.types import Rollout, Sampling
from opsd.utils.distributed import leave

pytestmark = pytest.mark.own_process

CALL = '<tool_call>\n{"name": "search_location", "arguments": {"place_name": "Nowhere"}}\n</tool_call><|im_end|>'


@pytest.fixture(scope="module")
def folder(thin_smollm2) -> Path:
    return thin_smollm2.folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def talk(tokenizer):
    return Talk(TravelEnv(), tokenizer, thinking=False, tool_output_characters=200)


class FirstCalls:
    """Writes a call in every first turn (this model would not), and lets the engine write the rest."""

    def __init__(self, engine, call_ids):
        self.engine, self.call_ids, self.turns = engine, call_ids, 0

    def generate(self, prompts, samples, sampling, seed):
        self.turns += 1
        if self.turns == 1:
            return [Rollout(number, prompt, self.call_ids, False) for number, prompt in enumerate(prompts)]
        return self.engine.generate(prompts, samples, sampling, seed)

    def sync(self):
        self.engine.sync()


def play(engine, talk, tokenizer):
    """Two episodes of at most two turns; what they hold is checked against the template's own text."""
    prompts = [talk.prompt(task) for task in generate_tasks(2, seed=1)]
    agent = AgentRollout(FirstCalls(engine, tokenizer(CALL).input_ids), talk, max_turns=2)
    rollouts = agent.generate(prompts, 1, Sampling(temperature=0.0, max_new_tokens=90), 0)
    head = (
        f"{CALL}\n<|im_start|>tool\nNothing was found for Nowhere. Use names, dates and coordinates exactly as tools "
        "return them.<|im_end|>\n<|im_start|>assistant\n"
    )
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        text = tokenizer.decode(rollout.response_ids)
        assert text.startswith(head) and len(text) > len(head) and rollout.prompt is prompt
        told = tokenizer.decode(
            [t for t, own in zip(rollout.response_ids, rollout.student_mask, strict=True) if not own]
        )
        assert CALL + told == head
        assert talk.score(rollout).hard_fraction == 0.0
    return [rollout.response_ids for rollout in rollouts]


@pytest.mark.e2e
def test_the_opening_names_tools_and_task_in_the_models_template(talk, tokenizer):
    (task,) = generate_tasks(1, seed=1)
    text = tokenizer.decode(talk.prompt(task).ids)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    assert '"name": "query_train_info"' in text and task.query in text


@pytest.fixture(scope="module")
def played(folder, talk, tokenizer) -> list[list[int]]:
    """What transformers writes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return play(HFRollout(model, tokenizer, 2), talk, tokenizer)


@pytest.mark.e2e
def test_transformers_plays_episodes(played):
    assert len(played) == 2


@pytest.mark.e2e
@pytest.mark.vllm
def test_vllm_plays_the_same_episodes(folder, played, talk, tokenizer):
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    from opsd.rollout.vllm import VLLMRollout

    student = load_scorer(str(folder), "--student", torch.float32, torch.device("cpu"))
    engine = TorchEngine(student, EngineConfig(), OptimConfig(lr=1e-3), torch.device("cpu"))
    rollout = RolloutConfig(engine="vllm", generate_batch=8)
    settings = vllm_settings(str(folder), tokenizer, engine, rollout, 2600)
    vllm = VLLMRollout(engine, rollout, settings)
    ours = play(vllm, talk, tokenizer)
    leave()
    assert ours == played
