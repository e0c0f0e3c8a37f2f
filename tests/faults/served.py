"""A stand-in for a served teacher: it answers as vLLM's pooling server does, or with a fault."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

WIDTH = 96  # the pocket teacher's


def hurry(teacher, url):
    """Have a VLLMTeacher wait for `url` no longer than 0.3 s: the others may be slow, as all are on a busy machine."""
    whole, patient = teacher._call, teacher._config

    def call(to, path, body):
        teacher._config = dataclasses.replace(patient, timeout_s=0.3) if to == url else patient
        return whole(to, path, body)

    teacher._call = call


class Server:
    """A pooling server whose states are `value`. It answers as it should until `fault` is set.

    keys: what came as Authorization.
    """

    def __init__(self):
        self.fault, self.value, self.asked, self.keys = "", 1.0, 0, set()
        self._over, server = threading.Event(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.keys.add(self.headers["Authorization"])
                self.answer(json.dumps({"data": [{"id": "m"}]}).encode(), {})

            def do_POST(self):
                request, fault = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), server.fault
                server.asked += 1
                if fault == "it hangs":
                    server._over.wait()
                if fault in ("it hangs", "it closes the connection"):
                    return
                if fault == "it refuses and repeats the key":
                    self.send_error(401, f"no such key: {self.headers['Authorization']}")
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
                    "its metadata is not JSON": "nonsense",
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
