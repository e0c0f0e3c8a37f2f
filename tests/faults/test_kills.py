"""Signals at random moments of every stage: what is resumed ends like the run that nothing disturbed, bit for bit."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from runs import ENVIRONMENT, ROOT, assert_same, flags

STAGES = ["rollout", "scoring", "backward", "weight sync", "checkpoint", "evaluation"]
# A frozen rank is killed when the others have ended.
EXIT = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGSTOP: -9}
ALONE, TWO = 1, 2
WAIT_S = 5
SAME = (
    "after resuming, metrics, masks, rollouts, evaluations, weights and optimiser match the undisturbed run bit for bit"
)


def live(
    folder: Path, ranks: int, number: signal.Signals, stages: list[str], *flags_of_struck: str, itself: bool = False
) -> list[dict]:
    """What became of runs that were struck, one in each stage (see lives.py)."""
    moments = [
        # Only the first rank writes checkpoints; elsewhere the last one is struck.
        {
            "stage": stage,
            "signal": int(number),
            "seed": seed,
            "rank": 0 if stage == "checkpoint" else ranks - 1,
            "flags": flags_of_struck,
            "itself": itself,
        }
        for seed, stage in enumerate(stages, start=100 * int(number))
    ]
    engine = {} if ranks == ALONE else {"engine__kind": "deepspeed", "engine__zero_stage": 2}
    words = ["train", *flags(checkpoint__keep=1, **engine)]
    order = {"folder": str(folder), "flags": words, "ranks": ranks, "moments": moments}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("lives.py"))],
        input=json.dumps(order),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["whole"] == [0] * ranks, found["said"]
    return found["struck"]


def check(folder: Path, ranks: int, number: signal.Signals, struck: list[dict]) -> str:
    """Assert what must have become of each life; a summary."""
    for place, life in enumerate(struck):
        run, code, others = folder / str(place), EXIT[number], list(life["codes"])
        assert "Traceback" not in life["said"], life["said"]
        if life["codes"][0]:  # struck in its last moments, it may finish
            assert others.pop(life["rank"]) == code, life
            # A rank falls with another one that was killed, or agrees with it to stop.
            assert all(other in ({1} if code == EXIT[signal.SIGKILL] else {1, code}) for other in others), life
            said_once = number != signal.SIGKILL or ranks == TWO
            assert life["said"].count("continue with") == said_once, life["said"]
            assert life["resumed"] == [0] * ranks, life
        assert_same(run, folder / "whole")
    slowest_s = max(life["took_s"] for life in struck)
    stages = Counter(life["stage"] for life in struck)
    assert any(life["codes"][0] for life in struck)
    return (
        f"{len(struck)} moments ({', '.join(f'{stage} {count}' for stage, count in stages.items())}); "
        f"all processes had ended within {slowest_s:.1f} s of the signal"
    )


@pytest.mark.slow
@pytest.mark.fault("kill -9 at random moments, one process", SAME)
def test_kill_alone(tmp_path, seen):
    seen(check(tmp_path, ALONE, signal.SIGKILL, live(tmp_path, ALONE, signal.SIGKILL, [*STAGES, "rollout"])))


@pytest.mark.slow
@pytest.mark.fault(
    "SIGTERM at random moments, one process",
    f"saves, says where, exit 143; {SAME}",
)
def test_terminate_alone(tmp_path, seen):
    seen(check(tmp_path, ALONE, signal.SIGTERM, live(tmp_path, ALONE, signal.SIGTERM, [*STAGES, "backward"])))


@pytest.mark.slow
@pytest.mark.fault(
    "Ctrl-C at random moments, one process",
    f"saves, says where, exit 130; {SAME}",
)
def test_interrupt_alone(tmp_path, seen):
    seen(check(tmp_path, ALONE, signal.SIGINT, live(tmp_path, ALONE, signal.SIGINT, [*STAGES, "scoring"])))


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 of one of two ranks at random moments (DeepSpeed over gloo, no launcher to end the other)",
    f"the other ends too, with one line; {SAME}",
)
def test_kill_one_of_two(tmp_path, seen):
    seen(check(tmp_path, TWO, signal.SIGKILL, live(tmp_path, TWO, signal.SIGKILL, [*STAGES, "rollout"])))


@pytest.mark.slow
@pytest.mark.fault(
    "SIGTERM to one of two ranks at random moments",
    f"both save and stop, exit 143; {SAME}",
)
def test_terminate_one_of_two(tmp_path, seen):
    seen(check(tmp_path, TWO, signal.SIGTERM, live(tmp_path, TWO, signal.SIGTERM, [*STAGES, "backward"])))


@pytest.mark.slow
@pytest.mark.fault(
    "Ctrl-C to one of two ranks at random moments",
    f"both save and stop, exit 130; {SAME}",
)
def test_interrupt_one_of_two(tmp_path, seen):
    seen(check(tmp_path, TWO, signal.SIGINT, live(tmp_path, TWO, signal.SIGINT, [*STAGES, "scoring"])))


@pytest.mark.slow
@pytest.mark.fault(
    f"one of two ranks freezes at random moments (SIGSTOP), `--engine.wait_s {WAIT_S}`, no launcher to end anything",
    f"the other waits {WAIT_S} s and ends with one line; {SAME}",
)
def test_freeze_one_of_two(tmp_path, seen):
    stages = ["evaluation", "rollout", "backward", "checkpoint"]
    struck = live(tmp_path, TWO, signal.SIGSTOP, stages, "--engine.wait_s", str(WAIT_S))
    said = [life["said"] for life in struck if life["codes"][0]]
    assert all(f"did not respond within {WAIT_S} s (--engine.wait_s)" in line for line in said)
    seen(check(tmp_path, TWO, signal.SIGSTOP, struck))


@pytest.mark.e2e
@pytest.mark.fault(
    "SIGTERM in a step whose checkpoint is not due, one process",
    "that step is saved, and the resumed run continues from it",
)
def test_terminate_saves_a_step_that_was_not_due(tmp_path):
    (life,) = struck = live(tmp_path, ALONE, signal.SIGTERM, ["backward"], itself=True)
    check(tmp_path, ALONE, signal.SIGTERM, struck)
    last = max(int(name.removeprefix("step_")) for name in life["saved"])
    assert last % 2, "checkpoints are due at even steps only: take another moment"
    assert (
        f"step_{last} is saved" in life["said"]
        and f"continues from {tmp_path}/0/checkpoints/step_{last}" in life["resumed said"]
    )
