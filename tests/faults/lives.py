"""Runs that a signal strikes at a random moment of a stage, then resumed. A program of its own (test_kills.py).

stdin: flags of a run, the number of ranks, and moments; stdout: what happened, as JSON. Each run is a fork of this
process, in which everything is imported already: two seconds instead of ten. The ranks are forks too, without a
launcher: nobody ends one of them because the other has ended.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import opsd.__main__
import opsd.distill.loss
import opsd.eval.evaluator
import opsd.rollout
import opsd.run.checkpoint
import opsd.train
from opsd.engine.deepspeed_engine import import_deepspeed

# Where a stage begins and ends.
STAGES = {
    "rollout": (opsd.rollout.HFRollout, "generate"),
    "scoring": (opsd.distill.loss, "choose"),
    "backward": (opsd.train, "distill"),
    "weight sync": (opsd.rollout.HFRollout, "sync"),
    "checkpoint": (opsd.run.checkpoint, "save"),
    "evaluation": (opsd.eval.evaluator.Evaluator, "run"),
}
LONGEST_S = 600.0
_told: list[int] = []
# In a run that strikes itself: the stage, how often it is still to begin, the signal.
_strike: list[Any] = []
_stages: list[str] = ["between"]


def tell() -> None:
    """Send the innermost stage to the process that watches; a call of no matter where else."""
    if _told:
        os.write(_told[0], f"{_stages[-1]}\n".encode())
    if _strike and _stages[-1] == _strike[0]:
        _strike[1] -= 1
        if not _strike[1]:
            os.kill(os.getpid(), _strike[2])


def watch(name: str, owner: Any, function: str) -> None:
    """Have `owner.function` tell when it begins and ends; within an evaluation, a rollout is evaluation."""
    whole = getattr(owner, function)

    @functools.wraps(whole)
    def told(*args: Any, **kwargs: Any) -> Any:
        _stages.append("evaluation" if "evaluation" in _stages else name)
        tell()
        try:
            return whole(*args, **kwargs)
        finally:
            _stages.pop()
            tell()

    setattr(owner, function, told)


@dataclass
class Life:
    """A run's processes. pipes: where each tells its stage. errors: files of their stderr."""

    pids: list[int]
    pipes: list[int]
    errors: list[Path]

    def stages(self, rank: int) -> Any:
        """The stages of a rank as it enters them, with the time."""
        rest = b""
        while data := os.read(self.pipes[rank], 4096):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line.decode(), time.monotonic()

    def ends(self, limit_s: float = LONGEST_S, frozen: int | None = None) -> list[int]:
        """Exit codes, negative for a signal; what does not end in time is killed, with code 999.

        frozen: a process that cannot end; it is killed once the others have.
        """
        codes, end = {}, time.monotonic() + limit_s
        while len(codes) < len(self.pids):
            if set(self.pids) - set(codes) == {frozen}:
                os.kill(frozen, signal.SIGKILL)
            for pid in set(self.pids) - set(codes):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = 999
            time.sleep(0.02)
        for pipe in self.pipes:
            os.close(pipe)
        return [codes[pid] for pid in self.pids]


def begin(args: list[str], ranks: int, name: Path, strike: tuple[Any, ...] = ()) -> Life:
    """Fork the processes of `opsd ARGS`. strike: the stage in which each strikes itself, which time, the signal."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    life = Life([], [], [])
    for rank in range(ranks):
        read, write = os.pipe()
        errors = name.with_suffix(f".{rank}.stderr")
        pid = os.fork()
        if not pid:
            _strike.extend(strike)
            live(args, rank, ranks, port, write, errors)
        os.close(write)
        life.pids.append(pid)
        life.pipes.append(read)
        life.errors.append(errors)
    return life


def live(args: list[str], rank: int, ranks: int, port: int, pipe: int, errors: Path) -> None:
    """The forked process: the command line, then the end."""
    code = 1
    try:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
        handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        _told.append(pipe)
        sys.argv = ["opsd", *args]
        opsd.__main__.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def strike(flags: list[str], out: Path, ranks: int, moment: dict[str, Any], seen: list[tuple[str, float]]) -> dict:
    """One run, struck in `moment["stage"]`, at a place and after a time that are drawn; then resumed.

    seen: what this rank of an undisturbed run told, from which the place is drawn. moment["flags"]: more of this run's.
    moment["itself"]: it strikes itself as the stage begins, so that no other process's turn decides how far it comes.
    """
    draw = random.Random(moment["seed"])
    entries = [place for place, (stage, _) in enumerate(seen[:-1]) if stage == moment["stage"]]
    place = draw.randrange(len(entries))
    lasts_s = seen[entries[place] + 1][1] - seen[entries[place]][1]
    wait_s = draw.random() * lasts_s
    itself = (moment["stage"], place + 1, moment["signal"]) if moment["itself"] else ()
    life = begin([*flags, *moment["flags"], "--out", str(out)], ranks, out, itself)
    pid = life.pids[moment["rank"]]
    if not itself:
        reach(life.stages(moment["rank"]), moment["stage"], place + 1)
        time.sleep(wait_s)
        os.kill(pid, moment["signal"])
    struck_s = time.monotonic()
    codes = life.ends(frozen=pid if moment["signal"] == signal.SIGSTOP else None)
    took_s = time.monotonic() - struck_s
    said = "".join(file.read_text() for file in life.errors)
    saved = sorted(path.name for path in (out / "checkpoints").glob("step_*"))
    again = begin(["train", "--resume", str(out)], ranks, out.with_name(f"{out.name} resumed"))
    return {
        **moment,
        "entry": place + 1,
        "wait_s": round(wait_s, 3),
        "codes": codes,
        "took_s": round(took_s, 2),
        "said": said,
        "saved": saved,
        "resumed": again.ends(),
        "resumed said": "".join(file.read_text() for file in again.errors),
    }


def reach(stages: Any, wanted: str, times: int) -> None:
    """Wait until the stage that is `wanted` has begun so many times."""
    for stage, _ in stages:
        times -= stage == wanted
        if not times:
            return
    raise AssertionError(f"the run ended before its {wanted} came")


def main() -> None:
    order = json.load(sys.stdin)
    import_deepspeed(torch.device("cpu"))
    for name, (owner, function) in STAGES.items():
        watch(name, owner, function)
    folder, flags, ranks = Path(order["folder"]), order["flags"], order["ranks"]
    whole = begin([*flags, "--out", str(folder / "whole")], ranks, folder / "whole")
    seen = [list(whole.stages(rank)) for rank in range(ranks)]
    codes = whole.ends()
    results = []
    if codes == [0] * ranks:
        for number, moment in enumerate(order["moments"]):
            results.append(strike(flags, folder / str(number), ranks, moment, seen[moment["rank"]]))
    said = "".join(file.read_text() for file in whole.errors)
    json.dump({"whole": codes, "said": said, "struck": results}, sys.stdout)


if __name__ == "__main__":
    main()
