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


def test_a_full_disk_is_still_an_error():
    words = [sys.executable, "-c", SCRIPT]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert done.returncode != 0 and "No space left on device" in done.stderr
