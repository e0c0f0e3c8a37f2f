"""The suite's own machinery on a folder of small tests: processes of their own, the memory guard, what was not run."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENGINES = """
import os
import pytest

pytestmark = pytest.mark.own_process
HEAP = []


@pytest.fixture(scope="module")
def process():
    HEAP.append(bytearray(50 * 2**20))
    return os.getpid()


def test_first(process, record_property):
    record_property("pid", process)
    print("said by the first")


def test_second(process, record_property):
    record_property("pid", process)
    record_property("parent", os.getppid())
    assert not "kept"


@pytest.mark.skip(reason="needs an engine")
def test_third():
    pass
"""
PLAIN = """
import os
import pytest


def test_plain(record_property):
    record_property("pid", os.getpid())


@pytest.mark.skip(reason="needs a browser")
@pytest.mark.parametrize("n", range(3))
def test_page(n):
    pass


@pytest.mark.slow
def test_slow():
    pass


@pytest.mark.slow
@pytest.mark.gpu
def test_both():
    pass
"""


def run(folder: Path, *options: str, **files: str) -> str:
    """What pytest says of a folder with these files, under this suite's machinery and markers."""
    for name, text in files.items():
        file = folder / name.replace("__", "/test_") if "__" in name else folder / f"test_{name}"
        file.parent.mkdir(exist_ok=True)
        file.with_suffix(".py").write_text(text)
    (folder / "conftest.py").write_text('pytest_plugins = ["own_process", "not_run"]\n')
    markers = "\n".join(
        [
            "[pytest]",
            "addopts = -q",
            "junit_family = xunit1",
            "markers =",
            "  slow: minutes long",
            "  gpu: needs a CUDA device",
        ]
    )
    (folder / "pytest.ini").write_text(markers)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TESTS_", "CI"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:hypothesispytest", *options],
        cwd=folder,
        env={**ours, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    ).stdout


@pytest.mark.e2e
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_marked_file_runs_in_one_process_that_ends_and_its_reports_are_shown(tmp_path, workers):
    options = ("-n", workers, "--dist", "loadfile", "--junit-xml", "report.xml")
    said = run(tmp_path, *options, engines=ENGINES, plain=PLAIN)
    assert re.search(r"^1 failed, 4 passed, 4 skipped in ", said.splitlines()[-1]), said
    assert "assert not 'kept'" in said and "said by the first" not in said
    first, second, plain = (properties(tmp_path / "report.xml", name) for name in ("first", "second", "plain"))
    assert first["pid"] == second["pid"] != plain["pid"]
    # Without workers this one process runs the other file, with two another one does.
    assert (second["parent"] == plain["pid"]) == (workers == "0")
    assert not Path(f"/proc/{first['pid']}").exists()


def properties(report: Path, test: str) -> dict[str, str]:
    """What a test recorded, by name."""
    cases = ElementTree.parse(report).iter("testcase")
    (case,) = (case for case in cases if case.get("name") == f"test_{test}")
    return {found.get("name", ""): found.get("value", "") for found in case.iter("property")}


@pytest.mark.e2e
def test_tests_before_and_after_it_are_set_up_and_torn_down_as_ever(tmp_path):
    mixed = "import pytest\ndef test_before(): pass\n@pytest.mark.own_process\ndef test_own(): pass\n"
    said = run(tmp_path, one__mixed=mixed, two__plain="def test_after(): pass\n")
    assert said.splitlines()[-1].startswith("3 passed in "), said


@pytest.mark.e2e
def test_a_process_of_its_own_that_dies_fails_what_it_had_not_run(tmp_path):
    dies = "import os, pytest\npytestmark = pytest.mark.own_process\ndef test_a(): pass\ndef test_b(): os._exit(7)\n"
    said = run(tmp_path, engines=f"{dies}def test_c(): pass\n")
    assert said.splitlines()[-1].startswith("2 failed, 1 passed in "), said
    assert said.count("ended with exit code 7 before the test did") == 2


@pytest.mark.e2e
def test_the_test_that_fills_a_worker_fails_and_the_others_do_not(tmp_path):
    limit = "import own_process\nown_process.LIMIT_MIB = 400\nKEPT = []\n"
    fills = "def test_a(): pass\ndef test_b(): KEPT.append(b'x' * 400 * 2**20)\ndef test_c(): pass\n"
    said = run(tmp_path, fills=limit + fills)
    assert said.splitlines()[-1].startswith("3 passed, 1 error in "), said
    assert re.search(r"teardown of test_b .*\nthis process now holds \d+ MiB, over 400: mark what", said), said


@pytest.mark.e2e
@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_was_not_run_is_said_by_groups_and_the_closing_line_comes_last(tmp_path, workers):
    said = run(tmp_path, "-n", workers, "--dist", "loadfile", "-m", "not slow and not gpu", plain=PLAIN)
    *_, skipped, browser, left_out, first, second, closing = said.splitlines()
    assert (skipped, browser) == ("3 skipped:", "      3 needs a browser")
    assert left_out == "2 left out by marker:"
    assert {first, second} == {"      1 slow (minutes long)", "      1 gpu (needs a CUDA device)"}
    assert re.match(r"1 passed, 3 skipped(, 2 deselected)? in ", closing)
