"""A sampler process without a model in place of `opsd.rollout.vllm_worker`: quick to start, fails when told to.

FAULT holds what it does, to which kind of request, and to which of that kind, e.g. "die load 2".
"""

import json
import os
import random
import signal
import sys
import time
from multiprocessing.connection import Connection

HIGHEST_ID = 9  # the digits of the pocket student's vocabulary


def main(line: Connection) -> None:
    fault, kind, count = os.environ.get("FAULT", "none none 0").split()
    left, settings = int(count), json.loads(line.recv_bytes())
    line.send_bytes(json.dumps({"answer": None}).encode())
    while True:
        try:
            request = json.loads(line.recv_bytes())
        except EOFError:
            return
        left -= request["do"] == kind
        struck = not left and request["do"] == kind
        if request["do"] == "load":
            while line.recv_bytes():
                if struck:
                    strike(fault, line)
        elif struck:
            strike(fault, line)
        line.send_bytes(json.dumps({"answer": answer(request, settings)}).encode())


def answer(request: dict, settings: dict) -> list | None:
    """Draws by (seed, rollout id), as vLLM's are; log-probabilities of no model."""
    if request["do"] == "sample":
        most = request["sampling"]["max_new_tokens"]
        return [draw(request["seed"], number, most) for number, _ in request["jobs"]]
    if request["do"] == "score":
        return [0.0] * (len(request["ids"]) - 1)
    return None


def draw(seed: int, number: int, most: int) -> list[int]:
    stream = random.Random(f"{seed}/{number}")
    return [stream.randint(0, HIGHEST_ID) for _ in range(stream.randint(1, most))]


def strike(fault: str, line: Connection) -> None:
    """What a fault does; where it is an answer, the process then waits to be ended."""
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    line.send_bytes(
        {
            "noise": b"\xff\x00{",
            "list": b"[]",
            "too-few": b'{"answer": []}',
            "no-list": b'{"answer": 7}',
            "no-token": b'{"answer": [[1], [1000000], [-1], [2]]}',
            "words": b'{"answer": [["one"], [1], [2], [3]]}',
            "no-numbers": json.dumps({"answer": ["a"] * 500}).encode(),
            "error": b'{"error": "RuntimeError: no kernel\\nand more lines"}',
        }[fault]
    )
    time.sleep(60)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
