"""A Hugging Face hub on this machine: what its client asks for to download a data set and to upload a model."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """address: for HF_ENDPOINT. datasets, uploaded: files by repository. made: which repositories were made."""

    address: str = ""
    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    uploaded: dict[str, dict[str, bytes]] = field(default_factory=dict)
    made: list[dict] = field(default_factory=list)
    refuses: bool = False


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub while the body runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bytes = b"{}", code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            words = self.path.partition("?")[0].strip("/").split("/")
            if words[:2] == ["api", "datasets"]:
                files = hub.datasets.get("/".join(words[2:4]))
                if files is None:
                    return self.answer(code=404, X_Error_Code="RepoNotFound")
                if "tree" in words:
                    tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]
                    return self.answer(json.dumps(tree).encode())
                about = {"id": "/".join(words[2:4]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                return self.answer(json.dumps(about).encode())
            if words[0] == "datasets" and "resolve" in words:
                body = hub.datasets["/".join(words[1:3])]["/".join(words[5:])]
                return self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
            return self.answer(code=404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body, words = self.rfile.read(int(self.headers["Content-Length"])), self.path.partition("?")[0].split("/")
            if hub.refuses:
                return self.answer(b'{"error": "no"}', 403)
            if words[-1] == "create":
                hub.made.append(json.loads(body))
                return self.answer(json.dumps({"url": f"{hub.address}/owner/name"}).encode())
            if "preupload" in words:
                files = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                return self.answer(json.dumps({"files": files}).encode())
            if "commit" in words:
                lines = [json.loads(line) for line in body.splitlines()]
                found = hub.uploaded.setdefault("/".join(words[3:5]), {})
                for line in lines:
                    if line["key"] == "file":
                        found[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                made = {"commitUrl": f"{hub.address}/owner/name/commit/{COMMIT}", "commitOid": COMMIT}
                return self.answer(json.dumps(made | {"success": True}).encode())
            return self.answer()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
