"""Run the fault suite (tests/faults) and write the table of its outcomes into docs/reliability.md."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- table: make faults -->", "<!-- end of table -->"
LIMIT_S = 1800.0


@dataclass
class Row:
    """One fault: what was done, what must happen, and how its tests (one, or one for each variant) ended."""

    part: str
    line: int
    done: str
    must: str
    outcomes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def result(self) -> str:
        """held, FAILED or not run; with counts if there were several tests."""
        held, failed = self.outcomes.count("held"), self.outcomes.count("FAILED")
        if failed:
            return f"**FAILED {failed} of {len(self.outcomes)}**"
        if not held:
            return "not run here"
        return "held" if len(self.outcomes) == 1 else f"held, {held} of {len(self.outcomes)}"


def main(out: Path = ROOT / "docs" / "reliability.md", short: bool = False) -> int:
    """Run the fault suite and write the table of its outcomes; exits with 0 if every fault was survived.

    Args:
        out: Page that contains the table.
        short: Only the part that `make test` runs too; the table is printed, not written.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run_suite(report, "not gpu and not slow" if short else "not gpu")
        text = table(read(report))
    print(text)
    if not short:
        write(out, text)
    return code


def run_suite(report: Path, which: str) -> int:
    """Run the tests into a JUnit file. Two at a time, one thread each."""
    command = [sys.executable, "-m", "pytest", "tests/faults", "-n", "2", "--dist", "worksteal", "-m", which]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [*command, f"--junit-xml={report}"], cwd=ROOT, env={**os.environ, **threads}, timeout=LIMIT_S, check=False
    ).returncode


def read(report: Path) -> list[Row]:
    """The rows of a JUnit file, in the order of the tests' files."""
    rows: dict[tuple[str, str, str], Row] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        values: dict[str, list[str]] = {}
        for item in case.iter("property"):
            values.setdefault(item.get("name", ""), []).append(item.get("value", ""))
        part = case.get("classname", "").rsplit(".", 1)[-1].removeprefix("test_").replace("_", " ")
        (done, *_), (must, *_) = values.get("done", [case.get("name", "")]), values.get("must", [""])
        line = int(values.get("line", ["0"])[0])
        row = rows.setdefault((part, done, must), Row(part, line, done, must))
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        row.outcomes.append("FAILED" if failed else "not run" if skipped is not None else "held")
        if skipped is not None:
            row.notes.append(skipped.get("message", ""))
        row.notes += values.get("seen", [])
    return sorted(rows.values(), key=lambda row: (row.part, row.line))


def table(rows: list[Row]) -> str:
    """Markdown, a table for each part."""
    lines: list[str] = []
    for part in dict.fromkeys(row.part for row in rows):
        lines += [f"### {part.capitalize()}", "", "| what was done | what must happen | result | seen |"]
        lines.append("|---|---|---|---|")
        for row in (row for row in rows if row.part == part):
            cells = [row.done, row.must, row.result(), "; ".join(dict.fromkeys(row.notes))]
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write(out: Path, text: str) -> None:
    """Replace the table in `out`."""
    before, rest = out.read_text().split(BEGIN)
    out.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
