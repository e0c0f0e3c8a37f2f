"""Numbers that are not finite, steps without a token: nothing moves, nothing is silent, every rank decides alike."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM
from two_ranks import run_ranks

from opsd.config import from_json
from opsd.rollout import HFRollout
from opsd.teacher import LocalTeacher
from opsd.train import resume, start
from opsd.utils.errors import RunStopped

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict:
    """Settings of a four-step run of tiny models that skips what it cannot train on."""
    folder = tmp_path_factory.mktemp("numbers")
    return {
        **tiny_pair(folder),
        "steps": 4,
        "prompts_per_step": 2,
        "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 5},
        "select": {"by": "soft_or", "normalise_over": "running"},
        "optim": {"lr": 1e-2, "on_nonfinite": "skip", "max_skipped_steps": 2},
        "engine": {"device": "cpu", "micro_batch_tokens": 24},
        "checkpoint": {"every": 1, "keep": 9},
        "telemetry": {"every": 1, "save_tokens": True, "top_tokens": 2, "save_rollouts_every": 0},
    }


@pytest.fixture
def spoil(monkeypatch):
    """Spoil the teacher's states, or empty the rollouts, of the steps that are named (counted by calls)."""

    def at(*steps, by=math.nan):
        whole, calls = LocalTeacher.hidden, []

        def hidden(self, batches):
            calls.append(1)
            found = whole(self, batches)
            if len(calls) in steps:
                found[0][0, 0] = by
            return found

        monkeypatch.setattr(LocalTeacher, "hidden", hidden)

    return at


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step_{step}").state_dict()


def moments_at(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step_{step}" / "trainer" / "optimizer.safetensors").read_bytes()


@pytest.mark.fault(
    "the teacher gives NaN, inf or −inf in one state of step 2, `--optim.on_nonfinite skip`",
    "step 2 is skipped and counted, its rollouts are saved, weights and optimiser do not change; the run finishes",
)
@pytest.mark.parametrize(
    "by", [math.nan, pytest.param(math.inf, marks=pytest.mark.e2e), pytest.param(-math.inf, marks=pytest.mark.e2e)]
)
def test_a_skipped_step_moves_nothing_and_is_counted(values, spoil, tmp_path, by):
    spoil(2, by=by)
    run = tmp_path / "run"
    start(from_json({**values, "out": str(run)}))
    lines = lines_of(run)
    assert [line["optim/skipped"] for line in lines] == [0, 1, 0, 0] and (run / "DONE").exists()
    assert "loss/nats" not in lines[1] and lines[1]["rollout/tokens"] > 0
    saved = (run / "rollouts" / "skipped_at_step_2.jsonl").read_text().splitlines()
    assert len(saved) == 4 and all(json.loads(line)["response_ids"] for line in saved)
    before, after, later = (weights_at(run, step) for step in (1, 2, 3))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert moments_at(run, 2) == moments_at(run, 1) != moments_at(run, 3)
    assert any(not torch.equal(later[name], after[name]) for name in after)


@pytest.mark.e2e
@pytest.mark.fault(
    "the teacher gives NaN in steps 2, 3 and 4, `--optim.max_skipped_steps 2`; then `--resume`",
    "stops in step 4 with one line, also if the first skips were before the resume",
)
def test_too_many_skips_in_a_row_stop_the_run_and_a_resume_remembers_them(values, spoil, tmp_path):
    run = tmp_path / "run"
    spoil(2, 3, 4)
    said = r"step 4: the teacher's states of 1 tokens are not finite \(2 steps before it were skipped"
    with pytest.raises(RunStopped, match=said) as stop:
        start(from_json({**values, "out": str(run)}))
    assert "\n" not in str(stop.value)
    assert {path.name for path in (run / "rollouts").iterdir()} == {
        "skipped_at_step_2.jsonl",
        "skipped_at_step_3.jsonl",
        "stopped_at_step_4.jsonl",
    }
    spoil(1)  # the first step after the resume: the third in a row
    with pytest.raises(RunStopped, match=r"step 4: .* \(2 steps before it were skipped"):
        resume(run)


@pytest.mark.e2e
@pytest.mark.fault(
    "the teacher gives NaN in step 2, `--optim.on_nonfinite stop` (the default)",
    "stops with one line and the step's rollouts; a resumed run ends like an undisturbed one",
)
def test_a_stopped_run_goes_on_to_the_same_numbers(values, spoil, tmp_path):
    stops = {**values, "optim": {"lr": 1e-2}}
    start(from_json({**stops, "out": str(tmp_path / "whole")}))
    with pytest.MonkeyPatch.context() as patch:
        whole = LocalTeacher.hidden
        calls = []
        patch.setattr(
            LocalTeacher,
            "hidden",
            lambda self, batches: (
                [h * (math.nan if len(calls) else 1) for h in whole(self, batches)]
                if calls.append(1) or len(calls) == 2
                else whole(self, batches)
            ),
        )
        with pytest.raises(RunStopped, match="step 2: the teacher's states of"):
            start(from_json({**stops, "out": str(tmp_path / "run")}))
    resume(tmp_path / "run")
    ours, whole = (weights_at(tmp_path / name, 4) for name in ("run", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.e2e
@pytest.mark.fault(
    "every response of step 2 is empty; every response is one token; every response hits the limit",
    "the empty step is skipped and counted, the others train as usual, and their metrics show it",
)
@pytest.mark.parametrize("length", [0, 1, 5])
def test_empty_short_and_cut_off_responses(values, tmp_path, monkeypatch, length):
    whole, calls = HFRollout.generate, []

    def generate(self, prompts, samples, sampling, seed):
        rollouts = whole(self, prompts, samples, sampling, seed)
        calls.append(1)
        if len(calls) == 2:
            for rollout in rollouts:
                rollout.response_ids[:] = ([7] * 5)[:length]
                object.__setattr__(rollout, "truncated", length == 5)
        return rollouts

    monkeypatch.setattr(HFRollout, "generate", generate)
    run = tmp_path / "run"
    start(from_json({**values, "out": str(run)}))
    line = lines_of(run)[1]
    assert (line["optim/skipped"], line["rollout/tokens"]) == (int(length == 0), 4 * length)
    assert line["rollout/truncated_frac"] == float(length == 5)
    if length:
        # Of one token one is kept, of five two.
        assert line["select/kept_frac"] == {1: 1.0, 5: 0.4}[length] and math.isfinite(line["loss/nats"])
        assert not (run / "rollouts").exists()
    else:
        assert (run / "rollouts" / "skipped_at_step_2.jsonl").exists()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("ranks") / "results.json"
    done = run_ranks(HERE / "numbers_worker.py", out)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.e2e
@pytest.mark.fault(
    "two ranks under DeepSpeed; the loss, the gradient or the teacher is not finite on the second rank only, or "
    "no rank has a token, before each of two good steps",
    "both ranks skip; weights and optimiser state equal those of a run without the bad steps bit for bit",
)
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "zero2, offloaded", "zero3, bfloat16"])
def test_every_rank_skips_and_no_shard_moves(of_two_ranks, engine):
    result = of_two_ranks[engine]
    for cause, words in {
        "loss": "the loss is nan nats",
        "gradient": "the gradient's norm is",
        "teacher": "the teacher's states of 1 tokens are not finite",
        "empty": "no token to train on",
    }.items():
        first, second = result["said"][cause]
        assert words in first and first == second
    assert result["equal"]
