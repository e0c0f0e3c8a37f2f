"""A teacher behind HTTP that hangs, dies or answers nonsense: tried again elsewhere, or one line."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from runs import POCKET

from opsd.batch import pack
from opsd.config import TeacherConfig, from_json
from opsd.errors import RunStopped
from opsd.prompts import Prompt
from opsd.rollout import Rollout
from opsd.teacher import vllm
from opsd.teacher.vllm import VLLMTeacher
from opsd.train import start

WIDTH = 96  # the pocket teacher's
FAULTS = {
    "it hangs": "timed out",
    "it closes the connection": "closed connection|reset",
    "it dies in the middle of an answer": "IncompleteRead",
    "it speaks no HTTP": "garbage",
    "its answer has no metadata": "NoneType",
    "its metadata is no JSON": "Expecting value",
    "its metadata is a list": "list indices",
    "its answer is shorter than it says": "buffer",
    "its states are of another width": "another width",
    "its states are of another sequence": "states for",
}


class Server:
    """A pooling server whose states are `value`. It answers as it should until `fault` is set."""

    def __init__(self):
        self.fault, self.value, self.asked, self._over, server = "", 1.0, 0, threading.Event(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(json.dumps({"data": [{"id": "m"}]}).encode(), {})

            def do_POST(self):
                request, fault = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), server.fault
                server.asked += 1
                if fault == "it hangs":
                    server._over.wait()
                if fault in ("it hangs", "it closes the connection"):
                    return
                if fault == "it speaks no HTTP":
                    self.wfile.write(b"garbage\r\n\r\n")
                    return
                width = WIDTH + (fault == "its states are of another width")
                more = fault == "its states are of another sequence"
                shapes = [[len(ids) + more, width] for ids in request["input"]]
                parts = [{"start": 0, "shape": shape} for shape in shapes]
                body = torch.full((max(rows for rows, _ in shapes) * width,), server.value).numpy().tobytes()
                metadata = {
                    "its answer has no metadata": None,
                    "its metadata is no JSON": "nonsense",
                    "its metadata is a list": "[1]",
                }.get(fault, json.dumps({"data": parts}))
                missing = len(body) // 2 if fault == "it dies in the middle of an answer" else 0
                body = body[:8] if fault == "its answer is shorter than it says" else body[missing:]
                self.answer(body, {} if metadata is None else {"metadata": metadata}, missing)

            def answer(self, body, headers, missing=0):
                self.send_response(200)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) + missing))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(vllm, "BACKOFF_S", 0.01)
    servers = [Server(), Server()]
    yield servers
    for server in servers:
        server.stop()


def teacher_of(*servers):
    urls = tuple(server.url for server in servers)
    config = TeacherConfig(model="m", kind="vllm", urls=urls, timeout_s=0.5, retries=1)
    teacher = VLLMTeacher(config, torch.zeros(50, WIDTH), torch.device("cpu"))
    teacher.connect()
    return teacher


BATCHES = pack([Rollout(0, Prompt("0", "", [3, 4], None), [5, 6, 7], True)], 16)


@pytest.mark.fault("one replica of a served teacher fails, in ten ways", "the next one is asked; the states are right")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_replica_is_asked(pair, fault):
    teacher = teacher_of(*pair)
    pair[0].fault, before = fault, pair[1].asked
    (hidden_NE,) = teacher.hidden(BATCHES)
    assert torch.equal(hidden_NE, torch.ones(3, WIDTH))
    assert pair[1].asked == before + 1


@pytest.mark.fault("the only served teacher fails, in ten ways", "after the retries the run stops in one line")
@pytest.mark.parametrize("fault", FAULTS)
def test_without_another_the_run_stops(pair, fault):
    teacher = teacher_of(pair[0])
    pair[0].fault = fault
    with pytest.raises(RunStopped, match=rf"^the teacher does not answer: 2 tries [^\n]*({FAULTS[fault]})[^\n]*$"):
        teacher.hidden(BATCHES)


@pytest.mark.e2e
@pytest.mark.fault("a served teacher's states are NaN", "the run stops in front of the update, in one line")
def test_states_that_are_no_numbers(pair, tmp_path):
    pair[0].value = float("nan")
    teacher = {"model": str(POCKET / "teacher"), "kind": "vllm", "urls": [pair[0].url]}
    values = {"student": str(POCKET / "student"), "teacher": teacher, "prompts": str(POCKET / "train.jsonl")}
    values |= {"prompt_format": "raw", "steps": 1, "prompts_per_step": 1, "engine": {"device": "cpu"}}
    values |= {"rollout": {"max_prompt_tokens": 16, "max_new_tokens": 4}, "track": {"progress": False}}
    with pytest.raises(RunStopped, match=r"^step 1: the teacher's states of \d+ tokens are not finite[^\n]*$"):
        start(from_json({**values, "out": str(tmp_path / "run")}))
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
