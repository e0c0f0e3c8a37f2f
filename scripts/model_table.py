"""Makes docs/models.md: which model families run in which roles, and the error of those that do not.

    python scripts/model_table.py                                          # without vLLM: minutes
    python scripts/model_table.py --ways "teacher, served" "student, vLLM" # needs vLLM; about a minute per cell
    python scripts/model_table.py --families Mixtral --ways student        # some cells again

A cell is one step of `opsd train` on two tiny random models (scripts/families.py). It is right if the step's loss is
the KL of both models' `model(ids).logits`, as transformers gives them. Cells are kept in docs/results/models.json; the
page is made from all of them. For a model of your own: `opsd check-model FOLDER`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch

import opsd.train  # noqa: F401  (before the ranks are forked)
from families import FAMILIES, own_kl, write
from opsd import __main__ as cli
from opsd.teacher.vllm import read_head
from opsd.utils.errors import UserError

ROOT = Path(__file__).parents[1]
CELLS, PAGE = ROOT / "docs" / "results" / "models.json", ROOT / "docs" / "models.md"
MARKS = "<!-- the table: scripts/model_table.py -->", "<!-- end of the table -->"
# The roles of a model in a run, as docs/models.md names them; the other model of the pair is a Qwen3.
STUDENTS, TEACHERS = ("student", "student, vLLM"), ("teacher", "teacher, sharded", "teacher, served")
WAYS = (*STUDENTS, *TEACHERS)
OTHER = "Qwen3"
# Largest relative difference between two computations of the same loss in fp32.
CLOSE = 1e-3
SERVER_S = 600


def main() -> None:
    """Fill the requested cells, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--ways", nargs="*", default=["student", "teacher", "teacher, sharded"], choices=list(WAYS))
    asked = parser.parse_args()
    # A fork has only the thread that called it.
    torch.set_num_threads(1)
    cells: dict[str, dict[str, str]] = json.loads(CELLS.read_text()) if CELLS.exists() else {}
    for family in asked.families:
        for way in asked.ways:
            try:
                found = cell(family, way)
            except TimeoutError as late:
                print(f"{family}, {way}: {late}", flush=True)
                continue
            cells.setdefault(family, {})[way] = found
            print(f"{family}, {way}: {found}", flush=True)
            CELLS.write_text(json.dumps(cells, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(PAGE.read_text(), cells))


def cell(family: str, way: str) -> str:
    """The outcome of a step: "right", or the error line."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pair = (family, OTHER) if way in STUDENTS else (OTHER, family)
        student, teacher = write(folder / "student", pair[0]), write(folder / "teacher", pair[1], seed=1)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("1+2=", "abcdefghijklmnop")))
        flags: dict[str, object] = {
            "student": student, "teacher": teacher, "prompts": prompts, "out": folder / "run", "steps": 1,
            "prompt_format": "raw", "prompts_per_step": 2, "rollout.samples_per_prompt": 2,
            "rollout.max_prompt_tokens": 16, "rollout.max_new_tokens": 16, "engine.device": "cpu",
            "telemetry.save_rollouts_every": 1, "telemetry.every": 0, "track.progress": False,
        }  # fmt: skip
        with served(teacher) if way == "teacher, served" else contextlib.nullcontext("") as url:
            flags |= {
                "student": {},
                "student, vLLM": {"rollout.engine": "vllm"},
                "teacher": {},
                "teacher, sharded": {"engine.kind": "deepspeed", "engine.zero_stage": 3, "teacher.shard": True},
                "teacher, served": {"teacher.kind": "vllm", "teacher.urls": url},
            }[way]
            code, said = train(flags, folder / "said", ranks=2 if way == "teacher, sharded" else 1)
        if code:
            lines = [line for line in said.splitlines() if line.startswith("opsd: ")]
            return (lines[-1].removeprefix("opsd: ") if lines else f"exit code {code}").replace(f"{folder}/", "")
        metrics = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        loss, own = metrics["loss/nats"], own_kl(folder / "run", student, teacher)
        return "right" if abs(loss - own) <= CLOSE * max(own, 1.0) else f"WRONG: {loss:.4f} for {own:.4f} nats"


def train(flags: dict[str, object], errors: Path, ranks: int) -> tuple[int, str]:
    """`opsd train` in one process or several; its exit code and its stderr.

    They are forks of this process, which has imported everything already, and rendezvous as under a launcher.
    """
    words = ["opsd", "train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    port = str(free_port())
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            run(words, errors, {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port})
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return max(codes, key=abs), errors.read_text(errors="replace")


def run(words: list[str], errors: Path, rank: dict[str, object]) -> NoReturn:
    """Run one rank to its end; does not return."""
    with errors.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if rank["WORLD_SIZE"] != 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in rank.items()}}
    sys.argv = words
    code: object = 1
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def served(teacher: Path) -> Iterator[str]:
    """Serve a model's hidden states; yields the address. No server is started for a head that cannot be read."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    try:
        read_head(str(teacher), torch.float32)
    except UserError:
        yield url
        return
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [
            "bash",
            str(ROOT / "scripts" / "serve_teacher.sh"),
            str(teacher),
            str(port),
            "--dtype",
            "float32",
            "--max-model-len",
            "64",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        answers(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def answers(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server is up, or has ended. Raises TimeoutError if it takes too long."""
    end = time.monotonic() + SERVER_S
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    if process.poll() is None:
        raise TimeoutError(f"vLLM's server did not start in {SERVER_S} s")


def page(text: str, cells: dict[str, dict[str, str]]) -> str:
    """The page with a new table between the two marks: a row per family, the error lines below."""
    notes: list[str] = []

    def short(said: str | None) -> str:
        if said is None:
            return "not tried"
        if said == "right" or said.startswith("WRONG"):
            return said
        if said not in notes:
            notes.append(said)
        return f"refused ({notes.index(said) + 1})"

    rows = []
    for family in FAMILIES:
        found = [short(cells.get(family, {}).get(way)) for way in WAYS]
        rows.append(f"| {family} | {' | '.join(found)} |")
    table = [
        f"| transformers {version('transformers')} | {' | '.join(WAYS)} |",
        f"|---|{'---|' * len(WAYS)}",
        *rows,
        "",
        *(f"{number}. `{line}`" for number, line in enumerate(notes, start=1)),
    ]
    head, rest = text.split(MARKS[0])
    return "\n".join([f"{head}{MARKS[0]}", "", *table, "", MARKS[1]]) + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    main()
