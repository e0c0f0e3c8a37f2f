"""Planted failures are named within 20 steps, once; what runs do when all is well raises no alarm."""

import random

import pytest

from opsd.config import TeacherConfig, TrainConfig
from opsd.run.health import Health

# Noise as the pocket runs have it, of 64 rollouts from 16 prompts.
HEALTHY = {
    "rollout/truncated_frac": lambda step, noise: max(0.0, 0.02 + 0.02 * noise),
    "length/mean_tokens": lambda step, noise: 38 + noise,
    "repetition/ngram_frac": lambda step, noise: max(0.0, 0.03 + 0.02 * noise),
    "student/entropy_nats": lambda step, noise: 0.09 + 0.05 * 0.98**step + 0.01 * noise,
    "loss/nats": lambda step, noise: 0.15 + 0.5 * 0.99**step + 0.1 * noise,
    "rollout/reward": lambda step, noise: min(1.0, 0.2 + 0.002 * step + 0.08 * noise),
}
RARELY = {
    "stop/student_prob": lambda step, noise: min(1.0, 0.95 + 0.03 * noise),
    "stop/delta_nats": lambda step, noise: -0.1 + 0.1 * noise,
}
START = 60


def config(health="warn", prompts=16):
    needed = {"student": "s", "teacher": TeacherConfig(model="t"), "prompts": "p", "out": "o"}
    return TrainConfig(**needed, health=health, prompts_per_step=prompts)


def lines(steps, seed=0, every=10, planted=None):
    """A run's metrics; planted: by name, what stands in for the healthy value from START on."""
    draws = random.Random(seed)
    for step in range(1, steps + 1):
        line = {"step": step}
        for name, value in (HEALTHY | (RARELY if step % every == 0 else {})).items():
            noise = draws.gauss(0, 1)
            line[name] = value(step, noise)
            if planted and name in planted and step > START:
                line[name] = planted[name](step - START, value(START, noise))
        yield line


def findings(series, **options):
    health = Health(config(**options))
    return {found.name: (line["step"], found.text) for line in series for found in health.see(line)}


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_raises_no_alarm(seed):
    assert findings(lines(240, seed)) == {}


PLANTED = {
    "truncation": {"rollout/truncated_frac": lambda k, usual: min(1.0, usual + k / 25)},
    "length": {"length/mean_tokens": lambda k, usual: usual * (1 + k / 16)},
    "repetition": {"repetition/ngram_frac": lambda k, usual: min(1.0, usual + k / 40)},
    "entropy": {"student/entropy_nats": lambda k, usual: usual * max(0.05, 1 - k / 10)},
    "reward": {"rollout/reward": lambda k, usual: usual * max(0.0, 1 - k / 8), "loss/nats": lambda k, usual: 0.3},
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_failure_is_named_within_20_steps(name, seed):
    found = findings(lines(START + 20, seed, planted=PLANTED[name]))
    assert list(found) == [name]
    step, text = found[name]
    assert START < step <= START + 20
    assert text.startswith("health: ")
    assert "--" in text
    assert "\n" not in text


@pytest.mark.parametrize("every", [1, 2, 5, 10])
@pytest.mark.parametrize(
    "planted",
    [
        {"stop/student_prob": lambda k, usual: 0.3},
        {"stop/delta_nats": lambda k, usual: -25.0},
    ],
)
def test_a_stop_that_is_trained_away_is_named_by_the_second_telemetry(planted, every):
    found = findings(lines(START + 20, every=every, planted=planted))
    assert list(found) == ["stop"]
    assert found["stop"][0] <= START + 20
    assert "--rollout.stop_tokens" in found["stop"][1]


def test_a_run_that_never_ends_its_answers_is_named_from_its_start():
    found = findings({"step": step, "rollout/truncated_frac": 1.0} for step in range(1, 9))
    assert list(found) == ["truncation"]
    assert found["truncation"][0] == 5


def test_every_finding_is_told_once_and_a_resumed_run_knows_what_was_told():
    series = list(lines(120, planted=PLANTED["truncation"]))
    whole = Health(config())
    told = [[finding.name for finding in whole.see(line)] for line in series]
    assert sum(map(len, told)) == 1
    at = next(place for place, names in enumerate(told) if names)
    resumed = Health(config())
    for line in series[: at + 1]:
        resumed.see(line)
    assert not [finding for line in series[at + 1 :] for finding in resumed.see(line)]
    early = Health(config())
    for line in series[: at - 3]:
        early.see(line)
    assert [[finding.name for finding in early.see(line)] for line in series[at - 3 :]] == told[at - 3 :]


def test_off_says_nothing():
    assert findings(lines(120, planted=PLANTED["truncation"]), health="off") == {}


def test_slow_growth_of_lengths_is_no_alarm():
    """A teacher that thinks longer is followed: lengths double in 240 steps."""
    series = [line | {"length/mean_tokens": 500 * 2 ** (line["step"] / 240)} for line in lines(240)]
    assert findings(series) == {}


def test_few_prompts_make_a_fall_of_the_reward_less_telling():
    series = [{"step": step, "rollout/reward": 0.9 if step < 30 else 0.6} for step in range(1, 60)]
    assert list(findings(series, prompts=64)) == ["reward"]
    assert findings(series, prompts=4) == {}
