"""Tests that load an engine run in a pytest of their own: when it ends, so does what they loaded.

The first test with the marker `own_process` starts it, for all that have it (the libraries of an engine take longer to
import than most tests to run); their reports come back and are shown as if the tests had run here. One worker takes all
files that start engines, here or elsewhere: two of them never meet. A worker that holds too much memory all the same
fails the test by which it came to it.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# In the pytest of their own: the file that the reports go to.
REPORTS = "TESTS_REPORTS"
MARKER = "own_process"
# What a worker may hold, libraries included; two of them, an engine and its trainer stay below 8 GB together.
LIMIT_MIB = 2560
# Folders whose tests take longest come first, so that no worker is left alone with one.
LONGEST = ("scale", "faults", "recipes", "environments")
PLACES = ("location", "longrepr")
FOUND = pytest.StashKey[dict[str, list[Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}: loads an engine: run in a process that ends")
    config.pluginmanager.register(Guard(), "memory-guard")
    if path := os.environ.get(REPORTS):
        config.pluginmanager.register(Told(config, Path(path)), "own-process-reports")


def pytest_collection_finish() -> None:
    """What was imported stays: garbage is not to be looked for there, again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines come first, then the longest folders."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.parent.name
        return not starts_engine(item.path), LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=place)


@cache
def starts_engine(file: Path) -> bool:
    """Whether a file's tests start engines; xdist's scheduler knows files only, not markers."""
    text = file.read_text()
    return any(f"pytest.mark.{name}" in text for name in ("vllm", MARKER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: files that start engines are one piece of work."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "engines" if starts_engine(config.rootpath / file) else file

    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Show the reports of a test that has run in a process of its own."""
    if REPORTS in os.environ or item.config.option.usepdb or item.get_closest_marker(MARKER) is None:
        return None
    found = item.session.stash.setdefault(FOUND, {})
    if item.nodeid not in found:
        found.update(run([other for other in item.session.items if other.get_closest_marker(MARKER)]))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in found.pop(item.nodeid):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What the test before this one left set up for this one's folder must not meet the next one's.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def run(items: list[pytest.Item]) -> dict[str, list[Any]]:
    """The reports of tests, by node id, from a pytest of their own. One that is missing has failed."""
    config = items[0].config
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reports"
        file.touch()
        # What was last failed is the caller's to note.
        options = ["-p", "no:lfplugin", "-p", "no:nfplugin", "--rootdir", str(config.rootpath)]
        if base := config.option.basetemp:
            Path(base).mkdir(parents=True, exist_ok=True)
            options += ["--basetemp", str(Path(base) / MARKER)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(item.nodeid for item in items)],
            cwd=config.rootpath,
            env={**os.environ, REPORTS: str(file)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found: dict[str, list[Any]] = {item.nodeid: [] for item in items}
        for line in file.read_text().splitlines():
            # JSON has no tuples, which is what a report's places are.
            data = {key: tuple(value) if key in PLACES and isinstance(value, list) else value
                    for key, value in json.loads(line).items()}  # fmt: skip
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            found[report.nodeid].append(report)
    for item in items:
        if not any(report.when == "teardown" for report in found[item.nodeid]):
            found[item.nodeid].append(unfinished(item, done))
    return found


def unfinished(item: pytest.Item, done: subprocess.CompletedProcess[str]) -> pytest.TestReport:
    """The report of a test whose process ended before it did."""
    said = (
        f"the process of this test ended with exit code {done.returncode} before the test did:\n{done.stdout[-4000:]}"
    )
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", said, "call")


class Told:
    """In the process of their own: write reports down for the one that asked."""

    def __init__(self, config: pytest.Config, file: Path) -> None:
        self._config, self._file = config, file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._file.open("a") as file:
            file.write(json.dumps(data) + "\n")


class Guard:
    """Fails the test by which a process came to hold more than LIMIT_MIB, where it is not one that ends soon."""

    def __init__(self) -> None:
        self._is_over = REPORTS in os.environ

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        yield
        if self._is_over or resident_mib() <= LIMIT_MIB:
            return
        gc.collect()
        if (holds := resident_mib()) > LIMIT_MIB:
            self._is_over = True
            pytest.fail(
                f"this process now holds {holds:.0f} MiB, over {LIMIT_MIB}: mark what loads so much with "
                f"@pytest.mark.{MARKER}",
                pytrace=False,
            )


def resident_mib() -> float:
    """This process's resident memory; 0 where /proc does not tell it."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if status.exists() else 0.0
