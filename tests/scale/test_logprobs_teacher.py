"""A teacher that gives log-probabilities over HTTP: what is asked, where answers belong, and what is lost."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny_models import build_model, tiny_pair
from tolerance import close, transformer

from opsd.config import TeacherConfig, from_json
from opsd.data.packing import empty, pack
from opsd.distill import distill_loss
from opsd.model.scorer import Scorer
from opsd.teacher import LocalTeacher
from opsd.teacher.logprobs import LogprobsTeacher
from opsd.train import start
from opsd.types import Prompt, Rollout
from opsd.utils.errors import UserError

CPU = torch.device("cpu")
VOCABULARY = 52


class StandIn:
    """Answers /v1/completions as vLLM does: of each token but the first, those as likely as asked for, and its own."""

    def __init__(self, model):
        self.asked, stand_in = [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send({"data": [{"id": "its name", "max_model_len": 64}]})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.asked.append(request)
                choices = [
                    {"index": n, "prompt_logprobs": [None, *stand_in.known(model, ids, request["prompt_logprobs"])]}
                    for n, ids in enumerate(request["prompt"])
                ]
                self.send({"choices": choices[::-1]})

            def send(self, answer):
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    def known(model, ids, most):
        with torch.no_grad():
            log_LV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, own in enumerate(ids[1:]):
            entries = {own, *log_LV[place].topk(most).indices.tolist()}
            yield {str(token): {"logprob": float(log_LV[place, token]), "rank": 1} for token in entries}

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def server():
    stand_in = StandIn(build_model(seed=1))
    yield stand_in
    stand_in.stop()


def teacher_of(server, most):
    teacher = LogprobsTeacher(TeacherConfig(model="m", kind="logprobs", urls=(server.url,), top_logprobs=most), CPU)
    teacher.connect(60)
    return teacher


def rollouts():
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(6, 49, (count,), generator=generator).tolist()

    masks = [None, [True, False, False, True, False], None]
    return [Rollout(n, Prompt(str(n), "", ids(2 + n), None), ids(k), True, masks[n]) for n, k in enumerate([4, 5, 1])]


def test_what_is_known_stands_where_the_students_tokens_are_predicted(server):
    batches = [*pack(rollouts(), 8), empty()]
    found = teacher_of(server, 3).hidden(batches)
    model = build_model(seed=1)
    by_id = {rollout.id: rollout for rollout in rollouts()}
    for micro, known_N8 in zip(batches, found, strict=True):
        assert known_N8.shape == (micro.student_tokens(), 8)
        row = 0
        for number in micro.rollout_N.unique().tolist():
            rollout = by_id[number]
            with torch.no_grad():
                log_LV = model(torch.tensor([rollout.prompt.ids + rollout.response_ids])).logits[0].log_softmax(-1)
            for place, by_student in enumerate(rollout.student_mask or [True] * len(rollout.response_ids)):
                if not by_student:
                    continue
                ids_4, log_4 = known_N8[row].chunk(2)
                at = len(rollout.prompt.ids) + place - 1
                token = rollout.response_ids[place]
                assert token in ids_4.tolist()
                for entry, value in zip(ids_4.long().tolist(), log_4.tolist(), strict=True):
                    close(value, log_LV[at, entry] if entry >= 0 else 0.0, *transformer(2, 16), size=5.0, cancels=True)
                row += 1
        assert row == len(known_N8)


@pytest.mark.numeric
def test_a_server_that_gives_all_log_probabilities_is_the_local_teacher(server):
    micros, local = pack(rollouts(), 100), LocalTeacher(Scorer(build_model(seed=1)), CPU)
    remote, student = teacher_of(server, VOCABULARY), Scorer(build_model(seed=0))
    (micro,), (theirs_ND,), (ours,) = micros, local.hidden(micros), remote.hidden(micros)
    student_ND = student.hidden(micro).detach()
    head_VD = student.head.weight.detach()
    assert remote.head_for(micro) is None
    exact, found = (
        distill_loss(student_ND, head_VD, states, head).loss_sum
        for states, head in ((theirs_ND, local.head_for(empty())), (ours, None))
    )
    close(found, exact, *transformer(2, 16), VOCABULARY)


@pytest.mark.e2e
def test_a_run_goes_through_with_statistics_and_a_selector(server, tmp_path):
    values = tiny_pair(tmp_path) | {
        "out": str(tmp_path / "run"),
        "steps": 2,
        "prompts_per_step": 2,
        "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 6},
        "select": {"by": "soft_or"},
        "engine": {"device": "cpu"},
        "telemetry": {"every": 1},
    }
    values["teacher"] |= {"kind": "logprobs", "urls": [server.url], "top_logprobs": 5}
    for name, loss in (("run", {}), ("sampled", {"divergence": "sampled_token"})):
        start(from_json(values | {"loss": loss, "out": str(tmp_path / name)}))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and all(line["student/reverse_kl_nats"] > 0 for line in lines)
    longer = values | {"rollout": {**values["rollout"], "max_new_tokens": 60}, "out": str(tmp_path / "long")}
    with pytest.raises(UserError, match=r"it takes 64 tokens, but the run's longest sequence may have 6[3-9]"):
        start(from_json(longer))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"loss": {"temperature": 0.5}},
            "--loss.temperature 0.5: --teacher.kind logprobs does not provide enough for that; give 1",
        ),
        ({"loss": {"memory": "whole"}}, "--loss.memory whole: .* give fused"),
        ({"telemetry": {"save_tokens": True, "top_tokens": 3}}, "--telemetry.top_tokens 3: .* give 0"),
        ({"teacher": {"model": "m", "kind": "logprobs", "urls": []}}, "--teacher.urls names no server"),
        (
            {"loss": {"divergence": "sampled_token"}, "rollout": {"top_p": 0.9}},
            "sampled_token needs samples from the trained distribution: give --rollout.temperature 1",
        ),
    ],
)
def test_what_log_probabilities_cannot_give_is_one_line(options, said):
    values = {"student": "s", "teacher": {"model": "m", "kind": "logprobs"}, "prompts": "p", "out": "o"}
    with pytest.raises(UserError, match=said):
        from_json(values | options)


def test_no_server_is_said():
    teacher = LogprobsTeacher(TeacherConfig(model="m", kind="logprobs", urls=("http://127.0.0.1:9",)), CPU)
    with pytest.raises(UserError, match="no server with prompt_logprobs answers there"):
        teacher.connect()


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({}, "no log-probability of a prompt's token 0"),
        (None, "no log-probability of a prompt's token 0"),
        ({"1000012": {"logprob": -1.0}}, "no log-probability of a prompt's token 0"),
        ({"0": {"logprob": -1.0}, "8": {"logprob": float("nan")}}, "nan as the log-probability of token 8"),
        ({"0": {"logprob": 1.0}}, "1.0 as the log-probability of token 0"),
    ],
)
def test_an_answer_without_the_token_or_with_no_log_probability_is_one_line(known, said, monkeypatch):
    teacher = LogprobsTeacher(TeacherConfig(model="m", kind="logprobs", urls=("http://u",)), CPU)
    answers = {"/v1/models": {"data": [{"id": "m"}]}, "/v1/completions": {"choices": [{"index": 0}]}}
    answers["/v1/completions"]["choices"][0]["prompt_logprobs"] = [None, known]
    monkeypatch.setattr(teacher, "_call", lambda _, path, __: (None, json.dumps(answers[path]).encode()))
    with pytest.raises(UserError, match=f"no server with prompt_logprobs answers there .{said}"):
        teacher.connect()
