"""A teacher behind HTTP: a stand-in shows what is asked, retried and said; a real server gives the local loss."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from served import hurry
from tolerance import close, transformer

from opsd.config import TeacherConfig
from opsd.data.packing import empty, pack
from opsd.distill import distill_loss
from opsd.model.loading import load_scorer
from opsd.teacher import LocalTeacher, vllm
from opsd.teacher.vllm import VLLMTeacher, read_head, split
from opsd.types import Head, Prompt, Rollout
from opsd.utils.errors import RunStopped, UserError

CPU = torch.device("cpu")
KEY = "a-secret"
WIDTH = 4


def rollouts(vocabulary=40):
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    return [Rollout(n, Prompt(str(n), "", ids(2 + n), None), ids(length), True) for n, length in enumerate([5, 1, 9])]


class StandIn:
    """A pooling server whose state of token t at place p is [t, p, 0, 0]; `faults` are taken before real answers."""

    def __init__(self, width=WIDTH):
        self.asked, self.faults, self.keys, stand_in = [], [], [], self
        self._over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(json.dumps({"data": [{"id": "its name"}]}).encode())

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.asked.append(request)
                stand_in.keys.append(self.headers["Authorization"])
                fault = stand_in.faults.pop(0) if stand_in.faults else None
                if fault == "late":
                    stand_in._over.wait()
                elif fault is not None:
                    return self.send_error(fault, "no such thing")
                states = [
                    torch.tensor([[token, place] + [0] * (width - 2) for place, token in enumerate(ids)]).float()
                    for ids in request["input"]
                ]
                parts, start = [], 0
                for state in states:
                    parts.append({"start": start, "shape": list(state.shape)})
                    start += state.numel() * 4
                body = b"".join(state.numpy().tobytes() for state in states)
                self.send(body, metadata=json.dumps({"data": parts}))

            def send(self, body, **headers):
                try:
                    self.send_response(200)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except BrokenPipeError:
                    pass  # the client's time was up: what the test is about

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
def servers(monkeypatch):
    monkeypatch.setattr(vllm, "BACKOFF_S", 0.01)
    monkeypatch.setenv("SCALE_TEST_KEY", KEY)
    pair = [StandIn(), StandIn()]
    yield pair
    for server in pair:
        server.stop()


def teacher_of(*servers, head=None, **options):
    urls = tuple(server if isinstance(server, str) else server.url for server in servers)
    config = TeacherConfig(model="m", kind="vllm", urls=urls, api_key_env="SCALE_TEST_KEY", **options)
    return VLLMTeacher(config, Head(torch.zeros(50, WIDTH)) if head is None else head, CPU)


def connected(*servers, **options):
    teacher = teacher_of(*servers, **options)
    teacher.connect()
    for server in servers:
        server.asked.clear()
    return teacher


def test_states_come_back_at_the_rows_that_predict_the_students_tokens(servers):
    teacher = connected(*servers)
    batches = [*pack(rollouts(), 12), empty()]
    found = teacher.hidden(batches)
    for micro, hidden_NE in zip(batches, found, strict=True):
        # The stand-in's state says which token stood there, and where in its sequence.
        assert hidden_NE[:, 0].tolist() == micro.input_ids_1L[0, micro.rows_N].tolist()
        assert hidden_NE[:, 1].tolist() == micro.position_ids_1L[0, micro.rows_N].tolist()
    assert found[-1].shape == (0, WIDTH)
    assert sum(len(server.asked) for server in servers) == len(batches) - 1  # an empty micro-batch asks nothing
    assert all(server.asked for server in servers)  # both replicas had work
    assert {key for server in servers for key in server.keys} == {f"Bearer {KEY}"}


def test_a_packed_row_is_split_where_positions_restart():
    (micro,) = pack(rollouts(), 100)
    sequences = [rollout.prompt.ids + rollout.response_ids[:-1] for rollout in rollouts()]
    assert split(micro) == sequences


def test_many_sequences_go_in_several_requests(servers, monkeypatch):
    monkeypatch.setattr(vllm, "SEQUENCES_PER_REQUEST", 2)
    teacher = connected(servers[0])
    (micro,) = pack(rollouts(), 100)
    (hidden_NE,) = teacher.hidden([micro])
    assert [len(request["input"]) for request in servers[0].asked] == [2, 1]
    assert hidden_NE[:, 0].tolist() == micro.input_ids_1L[0, micro.rows_N].tolist()


@pytest.mark.parametrize("fault", [500, 503, "late"])
def test_a_failed_request_is_tried_again_on_the_next_replica(servers, fault):
    teacher = connected(*servers, timeout_s=600.0)
    servers[0].faults = [fault]
    if fault == "late":
        hurry(teacher, servers[0].url)
    (micro,) = pack(rollouts(), 100)
    (hidden_NE,) = teacher.hidden([micro])
    assert hidden_NE[:, 0].tolist() == micro.input_ids_1L[0, micro.rows_N].tolist()
    assert [len(server.asked) for server in servers] == [1, 1]


def test_tries_are_bounded_and_the_end_is_one_line_without_the_key(servers):
    teacher = connected(servers[0], retries=2)
    servers[0].faults = [500] * 10
    with pytest.raises(RunStopped, match=r"does not answer: 3 tries over .*status 500") as stop:
        teacher.hidden(pack(rollouts(), 100))
    assert len(servers[0].asked) == 3
    assert "\n" not in str(stop.value) and KEY not in str(stop.value)


def test_a_server_that_died_is_said_so(servers):
    teacher = connected(servers[0], retries=1)
    servers[0].stop()
    with pytest.raises(RunStopped, match=r"does not answer: 2 tries .*refused"):
        teacher.hidden(pack(rollouts(), 100))


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_tried_again(servers, status):
    teacher = connected(*servers)
    servers[0].faults = servers[1].faults = [status] * 3
    with pytest.raises(RunStopped, match=f"refuses a request: status {status}"):
        teacher.hidden(pack(rollouts(), 100))
    assert sum(len(server.asked) for server in servers) == 1


def test_no_server_or_one_of_another_width_is_the_users_line():
    with pytest.raises(UserError, match=r"no pooling server answers there .*serve_teacher\.sh"):
        teacher_of("http://127.0.0.1:9").connect()
    other = StandIn(width=6)
    with pytest.raises(UserError, match="returns 6 numbers per token, but the head of --teacher m takes 4"):
        teacher_of(other).connect()
    other.stop()


@pytest.fixture(scope="module")
def served(thin_smollm2):
    """SmolLM2 behind the project's own script, on a free port, with a key."""
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    environment = {**os.environ, "VLLM_API_KEY": KEY, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    server = subprocess.Popen(
        ["scripts/serve_teacher.sh", str(thin_smollm2.folder), str(port), *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 900
    while True:
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < end, "the server did not come up"
            time.sleep(1)
    yield server, url
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
    server.wait(60)


@pytest.mark.numeric
@pytest.mark.e2e
@pytest.mark.vllm
def test_both_teachers_give_the_same_loss_then_a_killed_server_is_said_so(served, thin_smollm2, monkeypatch):
    server, url = served
    monkeypatch.setenv("SCALE_TEST_KEY", KEY)
    scorer = load_scorer(str(thin_smollm2.folder), "--teacher", torch.float32, CPU)
    local = LocalTeacher(scorer, CPU)
    remote = teacher_of(url, head=read_head(str(thin_smollm2.folder), torch.float32), retries=1)
    remote.connect()
    assert torch.equal(remote.head_for(empty()).weight_VD, local.head_for(empty()).weight_VD)
    batches = pack(rollouts(49000), 14)
    generator = torch.Generator().manual_seed(1)
    for micro, ours, theirs in zip(batches, remote.hidden(batches), local.hidden(batches), strict=True):
        student_ND = theirs + 0.3 * torch.randn(theirs.shape, generator=generator)
        served_loss, local_loss = (
            distill_loss(
                student_ND, local.head_for(empty()), states, local.head_for(empty()), rollout_N=micro.rollout_N
            ).loss_sum
            for states in (ours, theirs)
        )
        assert float(local_loss) > 0.1
        # Each of ten layers adds about 1/√10 to the stream, and as much of its rounding: that of one layer in all.
        close(served_loss, local_loss, *transformer(1, 576), 576, 49_152)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait(60)
    with pytest.raises(RunStopped, match="the teacher does not answer: 2 tries"):
        remote.hidden(batches)
