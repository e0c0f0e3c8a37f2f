"""What was not run, at the end of a run: skipped tests by reason, and those that `-m` left out, by marker."""

from collections import Counter
from typing import Any

import pytest

# What is named first of a test that several of these leave out.
MARKERS = ("gpu", "slow", "e2e", "vllm")
LEFT_OUT = pytest.StashKey[Counter[str]]()
ANOTHER = "not chosen"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        marker = next((name for name in MARKERS if item.get_closest_marker(name)), ANOTHER)
        item.config.stash[LEFT_OUT][marker] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells what it left out: all workers collect the same."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    left_out = getattr(node, "workeroutput", {}).get("left_out")
    if left_out is not None:
        node.config.stash[LEFT_OUT] = Counter(left_out)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    skipped = Counter(reason(report) for report in reports)
    meanings = dict(line.split(": ", 1) for line in config.getini("markers") if ": " in line)
    left_out = {
        f"{name} ({meanings[name]})" if name in meanings else name: count
        for name, count in config.stash[LEFT_OUT].most_common()
    }
    for what, groups in (("skipped", dict(skipped.most_common())), ("left out by marker", left_out)):
        if groups:
            terminalreporter.write_line(f"{sum(groups.values())} {what}:")
        for name, count in groups.items():
            terminalreporter.write_line(f"  {count:5} {name}")


def reason(report: pytest.TestReport) -> str:
    """Why a test was skipped, as it said."""
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")
