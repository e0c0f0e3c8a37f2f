"""Disks that fail: the run stops in one line, and goes on once they are mended."""

import resource
from pathlib import Path

import pytest
from runs import flags, opsd

from opsd.config import TeacherConfig, TrainConfig
from opsd.errors import RunStopped
from opsd.runfolder import RunFolder

SMALL = 50_000  # bytes: less than the pocket student's weights, more than any other file of its run


@pytest.mark.fault("the disk is full when a step's metrics are written (/dev/full)", "one line names file and cause")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full: Linux")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    run = RunFolder(tmp_path, TrainConfig("student", TeacherConfig("teacher"), "prompts", str(tmp_path)))
    with pytest.raises(RunStopped, match=r"metrics.jsonl cannot be written \(No space left on device\)[^\n]*--resume$"):
        run.write_metrics({"step": 1})


@pytest.mark.e2e
@pytest.mark.fault(
    "the checkpoint of step 1 does not fit (RLIMIT_FSIZE); then `--resume` without the limit",
    "one line, exit 1, no half checkpoint; the resumed run ends",
)
def test_a_checkpoint_that_does_not_fit(tmp_path):
    run, limit = tmp_path / "run", (SMALL, SMALL)
    few = flags(steps=1, eval__limit=1, eval__every=0)
    stopped = opsd("train", *few, "--out", run, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr, stopped.stderr
    assert stopped.stderr.count("step_1 cannot be written (File too large)") == 1, stopped.stderr
    assert not list((run / "checkpoints").iterdir())
    resumed = opsd("train", "--resume", run)
    assert resumed.returncode == 0 and (run / "DONE").exists(), resumed.stderr
