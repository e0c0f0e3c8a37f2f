"""A sampler in a process of its own that dies, freezes or answers nonsense: one line, in time, and resumable."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import ROOT, assert_same, flags
from tiny_models import tiny_pair, vllm_model

from opsd.config import TrainConfig
from opsd.config.cli import parse
from opsd.rollout import vllm_process as process
from opsd.rollout.vllm_process import Sampler, VLLMProcessRollout
from opsd.train import resume, start
from opsd.utils import distributed as ranks
from opsd.utils.errors import RunStopped

pytestmark = pytest.mark.e2e

TIMEOUT_S, PATIENT_S = 2, 600
LATE = rf"the sampler process gave no answer in {TIMEOUT_S} s \(--rollout.timeout_s\) and was ended"
NO_ANSWER = "the sampler process gave an invalid answer"
HALF = "line.sendall(struct.pack('!i', 100) + b'only this')"  # the header of a message of 100 bytes
FAULTS = {
    "half an answer, then silence": (f"{HALF}; time.sleep(60)", LATE),
    "silence": ("time.sleep(60)", LATE),
    "half an answer, then death": (f"{HALF}; sys.exit(3)", "ended with exit code 3"),
    "death": ("os.kill(os.getpid(), 9)", "ended with exit code -9"),
    "nonsense": ("line.sendall(struct.pack('!i', 2) + b'{x')", NO_ANSWER),
    "an error of its own": (
        "text = b'{\"error\": \"ValueError: no such model\"}'; line.sendall(struct.pack('!i', len(text)) + text)",
        r"failed \(ValueError: no such model\)",
    ),
}


def start_sampler(monkeypatch, does: str, timeout_s: float) -> Sampler:
    head = "import os, socket, struct, sys, time; line = socket.socket(fileno=int(sys.argv[1])); line.recv(1000); "
    monkeypatch.setattr(process, "PROGRAM", ("-c", head + does))
    return Sampler({}, gpus="", timeout_s=timeout_s)


@pytest.mark.numeric
@pytest.mark.fault("a sampler process fails as it starts, in six ways", "one line, in time; no process is left")
@pytest.mark.parametrize(("does", "line"), FAULTS.values(), ids=FAULTS)
def test_every_fault_is_one_line_and_leaves_no_process(does, line, monkeypatch):
    # Only one that never answers may run out of time, however busy the machine is.
    sampler = start_sampler(monkeypatch, does, TIMEOUT_S if line == LATE else PATIENT_S)
    with pytest.raises(RunStopped, match=line) as stop:
        sampler.answer()
    assert "\n" not in str(stop.value)
    sampler.close()
    assert sampler._process.poll() is not None


@pytest.mark.fault(
    "a sampler process takes no weights: its socket is full",
    "one line, in time",
)
def test_one_that_takes_no_weights_is_ended_too(monkeypatch):
    sampler = start_sampler(monkeypatch, "time.sleep(60)", TIMEOUT_S)
    sampler.send_bytes(bytes(2**24))  # more than a socket holds
    with pytest.raises(RunStopped, match=LATE):
        sampler.answer()


@pytest.fixture
def begin(monkeypatch):
    """Starts a run of four steps whose sampler is fake_sampler.py, with a fault; "" for none."""
    monkeypatch.setattr(process, "PROGRAM", (str(Path(__file__).with_name("fake_sampler.py")),))
    whole = Sampler.answer

    def answer(self):
        # Time begins to count when the process is frozen: one that is slow on a busy machine is not a fault.
        while self._sent and self._process.poll() is None and not self._line.poll(0.05):
            if psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED:
                break
        return whole(self)

    monkeypatch.setattr(Sampler, "answer", answer)

    def begin(out: Path, fault: str) -> None:
        settings = {
            "rollout__engine": "vllm_process",
            "rollout__timeout_s": TIMEOUT_S if fault.startswith("freeze") else PATIENT_S,
            # The fake has no model: its log-probabilities are all 0.
            "rollout__probe_tolerance": 50,
            "eval__teacher": False,
            "eval__at_start": False,
            "eval__every": 0,
            "eval__limit": 2,
        }
        if fault:
            monkeypatch.setenv("FAULT", fault)
        start(parse(TrainConfig, [*flags(**settings), "--out", str(out)], "opsd train"))

    yield begin
    ranks.leave()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Where the undisturbed run is, once it was made."""
    return tmp_path_factory.mktemp("sampler") / "whole"


@pytest.mark.e2e
@pytest.mark.fault(
    "in step 3 the sampler process dies or freezes, while it writes, takes weights or is checked; or its answer is not "
    "JSON, has another form or length, or contains token ids that do not exist; "
    f"`--rollout.timeout_s {TIMEOUT_S}`",
    "one line, in time, no process left; after resuming, metrics, masks and weights match the undisturbed run bit for "
    "bit",
)
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("die sample", "the sampler process ended with exit code -9"),
        ("die load", "the sampler process ended with exit code -9"),
        ("freeze sample", LATE),
        ("no-token sample", rf"{NO_ANSWER} \(a token that is not one of 0 to \d+\)"),
        ("too-few score", rf"{NO_ANSWER} \(\d+ log-probabilities were requested\)"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("die score", "the sampler process ended with exit code -9"),
                ("freeze load", LATE),
                ("noise sample", rf"{NO_ANSWER} \('utf-8' codec can't decode"),
                ("list sample", rf"{NO_ANSWER} \(neither an answer nor an error\)"),
                ("no-list sample", rf"{NO_ANSWER} \(4 rollouts were requested\)"),
                ("too-few sample", rf"{NO_ANSWER} \(4 rollouts were requested\)"),
                ("words sample", rf"{NO_ANSWER} \(a token that is not one of 0 to \d+\)"),
                ("no-numbers score", rf"{NO_ANSWER} \(\d+ log-probabilities were requested\)"),
                ("error load", r"the sampler process failed \(RuntimeError: no kernel\)"),
            )
        ),
    ],
)
def test_a_run_whose_sampler_fails(begin, whole, tmp_path, monkeypatch, fault, line):
    if not whole.exists():
        begin(whole, "")
        ranks.leave()
    run = tmp_path / "run"
    with pytest.raises(RunStopped, match=rf"^{line}[^\n]*; continue with --resume [^\n]*$"):
        begin(run, f"{fault} 3")
    assert not [child for child in psutil.Process().children() if "fake_sampler" in " ".join(child.cmdline())]
    monkeypatch.delenv("FAULT")
    resume(run)
    assert_same(run, whole)


def train(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "opsd", "train", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def sampler_of(run: subprocess.Popen[str], metrics: Path, steps: int) -> psutil.Process:
    """The run's sampler process, once so many steps are done."""
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= steps):
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.1)
    (found,) = [p for p in psutil.Process(run.pid).children() if "opsd.rollout.vllm_worker" in p.cmdline()]
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a student and a teacher of a shape that vLLM takes, and prompts."""
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    folder = tmp_path_factory.mktemp("models")
    tiny_pair(folder, vllm_model)
    return folder


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.fault(
    "a vLLM sampler misses the new weights of step 2",
    "the probe reports it in one line; after resuming, metrics, masks and weights match the undisturbed run bit "
    "for bit",
)
def test_vllm_with_stale_weights(models, tmp_path, monkeypatch):
    words = flags(
        student=models / "student",
        teacher=models / "teacher",
        prompts=models / "sums.jsonl",
        steps=3,
        rollout__engine="vllm_process",
        optim__lr=1e-2,
        checkpoint__every=1,
        **{"eval.suite": f"sums={models / 'sums.jsonl'}", "eval.teacher": False, "eval.limit": 2},
    )
    whole, run = (parse(TrainConfig, [*words, "--out", str(tmp_path / n)], "opsd train") for n in ("whole", "run"))
    start(whole)
    ranks.leave()
    load, calls = VLLMProcessRollout._load_weights, []

    def miss_the_second(self):
        calls.append(None)
        if len(calls) != 2:
            load(self)

    with monkeypatch.context() as stale:
        stale.setattr(VLLMProcessRollout, "_load_weights", miss_the_second)
        with pytest.raises(RunStopped, match=r"^the sampler's log-probabilities differ from the trainer's[^\n]*$"):
            start(run)
    ranks.leave()
    resume(tmp_path / "run")
    ranks.leave()
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.fault(
    "kill -9 of a vLLM sampler; in the resumed run, kill -9 of its trainer",
    "exit 1 with one line; the sampler ends with its trainer",
)
def test_vllm_that_is_killed_and_vllm_whose_trainer_is_killed(models):
    words = (
        "--student student --teacher teacher --prompts sums.jsonl --out run --prompt_format raw --steps 5000 "
        "--prompts_per_step 2 --rollout.engine vllm_process --rollout.samples_per_prompt 2 "
        "--rollout.max_prompt_tokens 8 --rollout.max_new_tokens 6 --rollout.generate_batch 4 --optim.lr 1e-3 "
        "--checkpoint.every 1 --engine.device cpu"
    )
    run, metrics = train(models, *words.split()), models / "run" / "metrics.jsonl"
    sampler_of(run, metrics, 2).kill()
    said = run.communicate(timeout=600)[1].strip().splitlines()
    assert run.returncode == 1
    assert said[-1].startswith("opsd: the sampler process ended with exit code -9") and "--resume run" in said[-1]
    assert not any("Traceback" in line for line in said)
    done = len(metrics.read_text().splitlines())

    resumed = train(models, "--resume", "run")
    sampler = sampler_of(resumed, metrics, done + 1)
    resumed.kill()
    resumed.communicate()
    sampler.wait(timeout=300)  # raises where it lives on
