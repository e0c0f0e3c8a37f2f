#!/usr/bin/env python
"""Run the cells of a table, several in parallel, with one display; recipes/common.sh passes them on standard input.

Finished cells are skipped, interrupted ones resumed. The first one that fails stops the others, which save a checkpoint
first; so does Ctrl-C or SIGTERM. The same command continues.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import BinaryIO

import psutil
import tyro
from rich.console import Console

from lanes.board import Board
from lanes.cell import Cell, read_cells
from opsd.utils.errors import UserError
from opsd.utils.signals import to_hear
from opsd.utils.streams import outlive_readers

POLL_S = 0.2
# One Ctrl-C can reach us twice, from the terminal and from make: only a later one counts as a second one.
REPEAT_S = 1.0
# How long processes that a cell's first process left behind may take to end before they are killed.
LEFTOVER_S = 120.0
SHOWN_LINES = 12


@dataclass
class Life:
    """A running cell: its first process, which leads its own session, and the lock that the process inherits.

    log_start: size of the cell's log before this start, in bytes.
    """

    cell: Cell
    process: subprocess.Popen[bytes]
    lock: BinaryIO
    log_start: int
    told_leftovers: bool = False

    def ask_to_stop(self) -> None:
        """Make opsd save and end; a second call makes it end at once."""
        if self.process.poll() is None:
            self.process.terminate()
        else:
            # DeepSpeed's launcher ends without stopping its ranks.
            self.strike(signal.SIGTERM)
            self.told_leftovers = True

    def strike(self, number: int) -> None:
        """Send a signal to the processes that the cell's first process left behind."""
        for process in self.leftovers():
            with suppress(psutil.NoSuchProcess):  # it has ended since
                process.send_signal(number)

    def leftovers(self) -> list[psutil.Process]:
        """The processes of the session that have not ended, except the first one."""
        return [other for other in psutil.process_iter() if other.pid != self.process.pid and self._has(other)]

    def _has(self, other: psutil.Process) -> bool:
        try:
            return os.getsid(other.pid) == self.process.pid and other.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, PermissionError, psutil.Error):
            return False


class Wish:
    """Which signal asked to stop, and how often; 0 if none."""

    def __init__(self) -> None:
        self.number, self.times, self._last_s = 0, 0, 0.0
        for number in to_hear():
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.times or now - self._last_s >= REPEAT_S:
            self.times += 1
        self.number, self._last_s = self.number or number, now


class Failed(Exception):
    """A cell has failed. code: the recipe's exit code; text: the message."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Lanes:
    """Runs cells in order, at most `lanes` at a time."""

    def __init__(self, cells: list[Cell], lanes: int, board: Board, wish: Wish) -> None:
        self._waiting, self._lanes = [cell for cell in cells if not cell.is_done], lanes
        self._board, self._wish = board, wish
        self.running: list[Life] = []

    def run(self) -> None:
        """Run all cells, until they end or a signal arrives.

        Raises Failed for the first one that fails, UserError for one that another recipe is running.
        """
        while (self._waiting or self.running) and not self._wish.times:
            while self._waiting and len(self.running) < self._lanes:
                self.running.append(self._start(self._waiting.pop(0)))
            time.sleep(POLL_S)
            self._board.look()
            for life in self.running:
                self._check(life)
            self.running = [life for life in self.running if life.process.returncode is None]

    def stop(self) -> None:
        """Make every running cell save and end, and wait for it. A second signal is passed on and ends them at once."""
        for life in self.running:
            life.ask_to_stop()
        passed, ended_s = max(1, self._wish.times), time.monotonic()
        while alive := [life for life in self.running if life.process.poll() is None or life.leftovers()]:
            time.sleep(POLL_S)
            self._board.look()
            for life in alive:
                if life.process.returncode is not None and not life.told_leftovers:
                    life.ask_to_stop()
                    ended_s = time.monotonic()
            if any(life.process.returncode is None for life in alive):
                ended_s = time.monotonic()
            if self._wish.times > passed:
                passed = self._wish.times
                for life in alive:
                    life.ask_to_stop()
            elif time.monotonic() - ended_s > LEFTOVER_S:
                for life in alive:
                    life.strike(signal.SIGKILL)

    def _start(self, cell: Cell) -> Life:
        cell.run.parent.mkdir(parents=True, exist_ok=True)
        if not cell.made.exists():
            cell.made.write_text(cell.line + "\n")
        lock = cell.made.open("rb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{cell.run} is being run by another recipe, or by leftovers of a killed one") from None
        command = cell.next_command
        self._board.begin(cell)
        with cell.log.open("ab") as log:
            log_start = log.tell()
            # The cell inherits the lock and keeps it even if this process is killed.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        return Life(cell, process, lock, log_start)

    def _check(self, life: Life) -> None:
        """Raises Failed if a cell has ended and its run has not finished."""
        code, cell = life.process.poll(), life.cell
        if code is None:
            return
        if code == 0 and cell.is_done:
            life.lock.close()
            self._board.end(cell)
            return
        if code == 0:
            # DeepSpeed's launcher exits with 0 if a part of it was killed.
            what = f"{cell.run} has not finished, although its launcher exited with 0; the same command continues it"
            raise Failed(2, what)
        shown = "\n".join(last_lines(life))
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            shown = shown or "no message, because of SIGKILL, which the system sends if memory runs out"
        what = f"{cell.name} failed ({how}; its output: {cell.log}); the same command continues\n{shown}"
        raise Failed(code if code > 0 else 128 - code, what)


def last_lines(life: Life) -> list[str]:
    """The end of a cell's output since this start: opsd's error line, or several lines if there is none."""
    said = life.cell.log.read_bytes()[life.log_start :].decode(errors="replace")
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1:] if lines and lines[-1].startswith("opsd: ") else lines[-SHOWN_LINES:]


def check(cells: list[Cell]) -> None:
    """Raises UserError if a run folder was made by another command."""
    for cell in cells:
        if cell.made.exists() and cell.made.read_text().rstrip("\n") != cell.line:
            raise UserError(
                f"{cell.run} was made by another command ({cell.made}); set RUNS to another folder, or remove both"
            )


def run(cells: list[Cell], title: str, lanes: int, recipe: str) -> int:
    """Run every cell that is not done; returns the exit code. Errors go to stderr."""
    wish = Wish()
    code, message = 0, ""
    with ExitStack() as stack:
        board = stack.enter_context(Board(title, cells, lanes, Console()))
        for cell in cells:
            if cell.is_done:
                board.say(f"{cell.label} {cell.name}: finished already")
        work = Lanes(cells, lanes, board, wish)
        try:
            work.run()
        except Failed as failed:
            code, message = failed.code, str(failed)
        except UserError as error:
            code, message = 2, str(error)
        if code or wish.times:
            others = [life for life in work.running if life.process.poll() is None]
            if others:
                board.say(f"stopping {', '.join(life.cell.name for life in others)}: saving checkpoints")
            work.stop()
            for life in others:
                board.say(f"{life.cell.name}: {'; '.join(last_lines(life)[-1:])}")
    if code:
        print(f"{recipe}: {message}", file=sys.stderr)
    elif wish.times:
        code = 128 + wish.number
        name = signal.Signals(wish.number).name
        print(f"{recipe}: stopped by {name}; the same command continues", file=sys.stderr)
    return code


def main(title: str, recipe: str, lanes: int | None = None) -> int:
    """Run the cells given on standard input, each word ended by NUL (lanes/cell.py).

    Args:
        title: Name of the table on the display.
        recipe: Name of the recipe, in front of messages.
        lanes: How many cells run at a time; None: one per core that this process may use.
    """
    cells = read_cells(sys.stdin.read())
    try:
        check(cells)
    except UserError as error:
        print(f"{recipe}: {error}", file=sys.stderr)
        return 2
    return run(cells, title, min(lanes or cores(), len(cells)), recipe)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    # Closing the terminal or `| head` must not leave cells behind that nobody watches.
    outlive_readers()
    sys.exit(tyro.cli(main))
