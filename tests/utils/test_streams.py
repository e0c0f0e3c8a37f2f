"""Output whose reader has left. A run's: tests/faults/test_output.py."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
from opsd.utils.errors import exits_on_bad_input
with exits_on_bad_input("script"):
    for number in range(10):
        print("x" * 100_000, flush=True)
"""


@pytest.mark.parametrize("words", [["-m", "opsd", "--help"], ["-c", SCRIPT]])
def test_a_command_ends_quietly_where_its_reader_has_left(words):
    read, write = os.pipe()
    shown = subprocess.Popen([sys.executable, *words], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.close(read)
    assert shown.communicate(timeout=300)[1] == b""
    assert shown.returncode == 0


def full(script: str, **streams: bool) -> subprocess.CompletedProcess[str]:
    """A script whose output, stdout or stderr, goes to a disk that is full."""
    with open("/dev/full", "wb") as disk:
        to = {name: disk for name in streams} | {name: subprocess.PIPE for name in {"stdout", "stderr"} - set(streams)}
        return subprocess.run([sys.executable, "-c", script], text=True, timeout=300, check=False, **to)


def test_results_that_a_full_disk_cannot_hold_are_an_error():
    done = full(SCRIPT, stdout=True)
    assert done.returncode != 0 and "No space left on device" in done.stderr


def test_lines_that_a_full_disk_cannot_hold_end_nothing():
    done = full(SCRIPT.replace("flush=True", "file=__import__('sys').stderr") + "print('done')", stderr=True)
    assert (done.returncode, done.stdout) == (0, "done\n")
