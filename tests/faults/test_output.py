"""Whoever reads a run's output leaves: a closed pipe, a closed terminal. The run goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from runs import ENVIRONMENT, ROOT, flags, metrics_of

OPSD = [sys.executable, "-m", "opsd"]
WAIT_S = 300


def started(words: list[str], stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*OPSD, *words], cwd=ROOT, env=ENVIRONMENT, stdout=stderr, stderr=stderr)


@pytest.mark.e2e
@pytest.mark.fault(
    "the reader of the output ends (`| head`), then SIGHUP (its terminal closes); resumed on a terminal that closes",
    "the run goes on; SIGHUP saves, exit 129; resumed, it finishes",
)
def test_nobody_reads(tmp_path):
    out, (read, write) = tmp_path / "run", os.pipe()
    words = ["train", *flags(out=out, steps=40, checkpoint__every=0, track__progress=True, eval__every=0)]
    run = started(words, write)
    os.close(write)
    assert os.read(read, 1)
    os.close(read)
    until = time.monotonic() + WAIT_S
    while not (out / "metrics.jsonl").exists() or len(metrics_of(out)) < 3:
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    run.send_signal(signal.SIGHUP)
    assert run.wait(WAIT_S) == 129
    (saved,) = [int(path.name.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*")]
    # The last step's line may still be to come: it is written after the checkpoint.
    assert saved - metrics_of(out)[-1]["step"] in (0, 1)

    terminal, theirs = os.openpty()
    run = started(["train", "--resume", str(out)], theirs)
    os.close(theirs)
    assert os.read(terminal, 1)
    os.close(terminal)
    assert run.wait(WAIT_S) == 0
    assert (out / "DONE").exists() and metrics_of(out)[-1]["step"] == 40
