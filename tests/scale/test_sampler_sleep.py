"""When a sampler beside the trainer sleeps: on a GPU alone, so vLLM's engine is one that keeps to its rules."""

import inspect

import pytest

from opsd.rollout import vllm as module
from opsd.rollout.probe import Probe
from opsd.rollout.vllm import VLLMRollout
from opsd.types import Prompt, Sampling
from opsd.utils.distributed import ONE_RANK


class Memory:
    """vLLM's engine as far as its memory goes; weights that a sleep has dropped are None until they are loaded."""

    def __init__(self, weights):
        self.weights, self.asleep, self.calls = weights, set(), []

    def sleep(self, level):
        assert level == 2 and not self.asleep
        self.asleep, self.weights = {"weights", "kv_cache"}, None
        self.calls.append("sleep")

    def wake_up(self, tags):
        assert set(tags) <= self.asleep
        self.asleep -= set(tags)
        self.calls.append(f"wake {tags[0]}")

    def load(self, weights):
        assert "weights" not in self.asleep
        self.weights = weights
        self.calls.append(f"load {weights}")

    def run(self, what):
        assert not self.asleep and self.weights is not None
        self.calls.append(f"{what} {self.weights}")


class WatchedProbe(Probe):
    def __init__(self, sampler):
        self._ids, self._most, self._sampler = [], 96, sampler

    def check(self, score):
        self._sampler._llm.run("probe")


class Sampler(VLLMRollout):
    def __init__(self, trainer, sleeps):
        self.trainer, self._sleeps, self._llm = trainer, sleeps, Memory(trainer["weights"])
        self._ranks, self._width, self._eos_ids = ONE_RANK, 1, [1]
        self._probe = WatchedProbe(self)
        self._rest()

    def sample(self, jobs, sampling, seed):
        self._llm.run("write")
        return [[7, 1] for _ in jobs]

    def _load_weights(self):
        self._llm.load(self.trainer["weights"])


@pytest.fixture
def run():
    prompt, sampling = Prompt("0", "", [5], None), Sampling(max_new_tokens=4)

    def steps(sleeps):
        trainer = {"weights": 0}
        sampler = Sampler(trainer, sleeps)
        for _ in range(2):
            sampler.generate([prompt], 1, sampling, seed=0)
            trainer["weights"] += 1
            sampler.sync()
        # Two suites of an evaluation, one behind the other.
        for _ in range(2):
            sampler.generate([prompt], 1, sampling, seed=0)
        return sampler._llm.calls

    return steps


def woken(weights):
    return ["wake weights", f"load {weights}", "wake kv_cache"]


def test_it_sleeps_from_the_end_of_a_rollout_to_the_next_weights_and_moves_none_that_are_replaced(run):
    assert run(sleeps=True) == [
        *("sleep", *woken(0), "write 0", "probe 0", "sleep"),
        *(*woken(1), "probe 1", "write 1", "sleep"),
        *(*woken(2), "probe 2", "write 2", "sleep"),
        # No weights are newer, but none were kept.
        *(*woken(2), "write 2", "sleep"),
    ]


def test_without_sleep_weights_are_loaded_once_per_step(run):
    assert run(sleeps=False) == [
        "write 0",
        "probe 0",
        "load 1",
        "probe 1",
        "write 1",
        "load 2",
        "probe 2",
        "write 2",
        "write 2",
    ]


@pytest.mark.vllm
@pytest.mark.e2e
@pytest.mark.own_process
def test_vllms_own_engine_takes_these_calls():
    vllm = module._import_vllm(module.torch.device("cpu"))
    assert "level" in inspect.signature(vllm.LLM.sleep).parameters
    assert "tags" in inspect.signature(vllm.LLM.wake_up).parameters
    from vllm.v1.executor.abstract import SLEEP_TAGS

    assert sorted(SLEEP_TAGS) == ["kv_cache", "weights"]
