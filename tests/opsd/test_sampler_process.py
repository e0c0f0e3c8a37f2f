"""A sampler process that fails in every way a process can: one line each, in bounded time. vLLM is not needed."""

import pytest

from opsd.errors import RunStopped
from opsd.rollout import process
from opsd.rollout.process import Sampler

HALF = "line.sendall(struct.pack('!i', 100) + b'only this')"  # the header of a message of 100 bytes
FAULTS = {
    "half an answer, then silence": (f"{HALF}; time.sleep(60)", r"gave no answer in 1 s \(--rollout.timeout_s\)"),
    "silence": ("time.sleep(60)", r"gave no answer in 1 s \(--rollout.timeout_s\)"),
    "half an answer, then death": (f"{HALF}; sys.exit(3)", "ended with exit code 3"),
    "death": ("os.kill(os.getpid(), 9)", "ended with exit code -9"),
    "nonsense": ("line.sendall(struct.pack('!i', 2) + b'{x')", "gave what is no answer"),
    "an error of its own": (
        "text = b'{\"error\": \"ValueError: no such model\"}'; line.sendall(struct.pack('!i', len(text)) + text)",
        r"failed \(ValueError: no such model\)",
    ),
}


def start(monkeypatch, does: str) -> Sampler:
    head = "import os, socket, struct, sys, time; line = socket.socket(fileno=int(sys.argv[1])); line.recv(1000); "
    monkeypatch.setattr(process, "PROGRAM", ("-c", head + does))
    return Sampler({}, gpus="", timeout_s=1)


@pytest.mark.parametrize(("does", "line"), FAULTS.values(), ids=FAULTS)
def test_every_fault_is_one_line_and_leaves_no_process(does, line, monkeypatch):
    sampler = start(monkeypatch, does)
    with pytest.raises(RunStopped, match=line) as stop:
        sampler.answer()
    assert "\n" not in str(stop.value)
    sampler.close()
    assert sampler._process.poll() is not None


def test_one_that_takes_no_weights_is_ended_too(monkeypatch):
    sampler = start(monkeypatch, "time.sleep(60)")
    sampler.send_bytes(bytes(2**24))  # more than a socket holds
    with pytest.raises(RunStopped, match="gave no answer in 1 s"):
        sampler.answer()
