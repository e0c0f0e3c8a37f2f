"""A teacher behind HTTP that hangs, dies or answers nonsense: tried again elsewhere, or one line. Who may ask it."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, POCKET, ROOT
from served import WIDTH, Server, hurry

from opsd.config import TeacherConfig, from_json
from opsd.data.packing import pack
from opsd.teacher import vllm
from opsd.teacher.vllm import VLLMTeacher
from opsd.train import start
from opsd.types import Head, Prompt, Rollout
from opsd.utils.errors import RunStopped
from opsd.utils.served_key import KeyOnEveryPath

FAULTS = {
    "it hangs": "timed out",
    "it closes the connection": "closed connection|reset",
    "it dies in the middle of an answer": "IncompleteRead",
    "it speaks no HTTP": "garbage",
    "its answer has no metadata": "NoneType",
    "its metadata is not JSON": "Expecting value",
    "its metadata is a list": "list indices",
    "its answer is shorter than it says": "buffer",
    "its states are of another width": "another width",
    "its states are of another sequence": "states for",
}


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(vllm, "BACKOFF_S", 0.01)
    servers = [Server(), Server()]
    yield servers
    for server in servers:
        server.stop()


def teacher_of(*servers):
    urls = tuple(server.url for server in servers)
    config = TeacherConfig(model="m", kind="vllm", urls=urls, timeout_s=600, retries=1)
    teacher = VLLMTeacher(config, Head(torch.zeros(50, WIDTH)), torch.device("cpu"))
    teacher.connect()
    return teacher


BATCHES = pack([Rollout(0, Prompt("0", "", [3, 4], None), [5, 6, 7], True)], 16)


@pytest.mark.fault(
    "one replica of a served teacher fails, in ten ways",
    "the next replica is asked; the states are right",
)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_replica_is_asked(pair, fault):
    teacher = teacher_of(*pair)
    if fault == "it hangs":
        hurry(teacher, pair[0].url)
    pair[0].fault, before = fault, pair[1].asked
    (hidden_NE,) = teacher.hidden(BATCHES)
    assert torch.equal(hidden_NE, torch.ones(3, WIDTH))
    assert pair[1].asked == before + 1


@pytest.mark.fault("the only served teacher fails, in ten ways", "after the retries the run stops in one line")
@pytest.mark.parametrize("fault", FAULTS)
def test_without_another_the_run_stops(pair, fault):
    teacher = teacher_of(pair[0])
    if fault == "it hangs":
        hurry(teacher, pair[0].url)
    pair[0].fault = fault
    with pytest.raises(RunStopped, match=rf"^the teacher does not answer: 2 tries [^\n]*({FAULTS[fault]})[^\n]*$"):
        teacher.hidden(BATCHES)


@pytest.mark.e2e
@pytest.mark.fault(
    "a served teacher's states are NaN",
    "the run stops before the update, in one line",
)
def test_states_that_are_no_numbers(pair, tmp_path):
    pair[0].value = float("nan")
    teacher = {"model": str(POCKET / "teacher"), "kind": "vllm", "urls": [pair[0].url]}
    values = {"student": str(POCKET / "student"), "teacher": teacher, "prompts": str(POCKET / "train.jsonl")}
    values |= {"prompt_format": "raw", "steps": 1, "prompts_per_step": 1, "engine": {"device": "cpu"}}
    values |= {"rollout": {"max_prompt_tokens": 16, "max_new_tokens": 4}, "track": {"progress": False}}
    with pytest.raises(RunStopped, match=r"^step 1: the teacher's states of \d+ tokens are not finite[^\n]*$"):
        start(from_json({**values, "out": str(tmp_path / "run")}))
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


# ---- the server itself: scripts/serve_teacher.sh

KEY = "5ecret-of-the-teacher"


def served(folder, *flags, **environment):
    """The script with a stand-in for python; what it starts is noted in `folder`/started."""
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "serve_teacher.sh", folder / "scripts")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >started\n')
    (folder / "bin" / "python").chmod(0o755)
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    command = ["bash", folder / "scripts" / "serve_teacher.sh", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done, (folder / "started").read_text().splitlines() if (folder / "started").exists() else None


@pytest.mark.fault(
    "a teacher is served with no options, with HOST, with a key, with the key as a flag",
    "it listens on this machine unless HOST opens it; a key guards every path; a flag that shows the key is refused",
)
@pytest.mark.parametrize("case", ["plain", "open", "key", "flag"])
def test_a_teacher_is_served_to_this_machine_unless_told_otherwise(case, tmp_path):
    environment = {"open": {"HOST": "0.0.0.0"}, "key": {"HOST": "0.0.0.0", "VLLM_API_KEY": KEY}}.get(case, {})
    flags = ["--api-key", KEY] if case == "flag" else ["--dtype", "float32"]
    done, started = served(tmp_path, "model", "8001", *flags, **environment)
    if case == "flag":
        assert (done.returncode, started) == (2, None)
        assert "VLLM_API_KEY" in done.stderr and done.stderr.count("\n") == 1 and KEY not in done.stderr
        return
    assert done.returncode == 0 and started[started.index("--port") + 1] == "8001"
    assert started[started.index("--host") + 1] == ("127.0.0.1" if case == "plain" else "0.0.0.0")
    assert ("opsd.utils.served_key.KeyOnEveryPath" in started) is (case == "key")
    assert ("no VLLM_API_KEY" in done.stderr) is (case == "open")
    assert KEY not in " ".join(started) + done.stdout + done.stderr


@pytest.mark.fault(
    "requests without the key, with a wrong one and with the right one, on every path of a served teacher",
    "status 401 before anything is computed, except with the right key; /health answers",
)
@pytest.mark.parametrize(
    "path", ["/pooling", "/v1/models", "/metrics", "/docs", "/health/../pooling", "/health", "//health"]
)
def test_a_request_without_the_key_is_refused(path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope["path"])

    async def send(message):
        sent.append(message)

    def ask(kind, *headers):
        passed.clear()
        sent.clear()
        asyncio.run(KeyOnEveryPath(app)({"type": kind, "path": path, "headers": [*headers]}, None, send))
        return bool(passed), sent[0].get("status") if sent else None

    wrong = [(b"authorization", text) for text in (b"", KEY.encode(), b"Bearer ", b"Bearer wrong", b"Bearer \xff")]
    is_open = path == "/health"
    for headers in ([], *([header] for header in wrong)):
        assert ask("http", *headers) == ((True, None) if is_open else (False, 401))
        assert ask("websocket", *headers)[0] is is_open
    right = (b"authorization", f"Bearer {KEY}".encode())
    assert ask("http", right) == ask("websocket", right) == ask("lifespan") == (True, None)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.fault(
    "vLLM serves a real model with a key: states and model names are requested without it, with a wrong one, with it",
    "status 401, 401, 200; the socket is bound to 127.0.0.1; the log holds no key",
)
def test_a_real_server_asks_for_its_key(smollm2, tmp_path):
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            ["scripts/serve_teacher.sh", str(smollm2.folder), str(port), *flags],
            cwd=ROOT,
            env={**ENVIRONMENT, "VLLM_API_KEY": KEY},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 900
        while status(port, "/health") != 200:
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(1)
        request = {
            "model": str(smollm2.folder),
            "input": [[1, 2, 3]],
            "task": "token_embed",
            "encoding_format": "bytes",
        }
        for path, body in (("/v1/models", None), ("/pooling", request)):
            assert [status(port, path, body, key) for key in (None, "wrong", KEY)] == [401, 401, 200]
        # 0100007F is 127.0.0.1, state 0A is listening.
        table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        bound = [row[1] for row in table if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
        assert bound == [f"0100007F:{port:04X}"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert KEY not in (tmp_path / "log").read_text()


def status(port, path, body=None, key=None):
    """The status of an answer; 0 where there is none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
