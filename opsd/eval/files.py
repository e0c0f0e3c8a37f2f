"""The files of `opsd eval --out FILE.json`: the finished problems, the result, and a readable table."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from opsd.eval.evaluator import ProblemRecord
from opsd.run.began import parse_time
from opsd.run.disk import append, replace, writing
from opsd.utils.errors import UserError, said
from opsd.utils.going_on import can_go_on
from opsd.utils.markdown import markdown_text

Header = dict[str, Any]
# What to do if a running evaluation cannot write.
GO_ON = "fix that, then give the same command again"


@dataclasses.dataclass(frozen=True)
class DoneProblem:
    """A line of FILE.records.jsonl. responses: the texts, if they are to be saved."""

    suite: str
    record: ProblemRecord
    responses: list[str] | None = None

    def to_line(self) -> str:
        """The problem as one line of JSON."""
        values: dict[str, Any] = {"suite": self.suite, **dataclasses.asdict(self.record)}
        if self.responses is not None:
            values["responses"] = self.responses
        return json.dumps(values) + "\n"

    @classmethod
    def from_line(cls, line: str) -> DoneProblem | None:
        """The inverse; None for a line that was cut short when the process was killed."""
        try:
            values = json.loads(line)
            responses = values.pop("responses", None)
            return cls(values.pop("suite"), ProblemRecord(**values), responses)
        except (ValueError, AttributeError, KeyError, TypeError):
            return None


class EvalFiles:
    """FILE.json and FILE.md (written at the end), FILE.records.jsonl (as it runs), FILE.partial.json (until the end).

    A header has every setting that the numbers depend on. It is in FILE.partial.json while the evaluation runs, and in
    FILE.json afterwards; a command that continues must have the same header.
    """

    def __init__(self, out: str) -> None:
        self.result = Path(out)
        if self.result.suffix != ".json":
            raise UserError(
                f"--out {out}: give a file that ends in .json; its table and records are written next to it"
            )
        try:
            there = self.result.is_dir()
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror}); give another file") from error
        if there:
            raise UserError(f"--out {out} is a folder; give a file")
        self.table = self.result.with_suffix(".md")
        self.records = self.result.with_suffix(".records.jsonl")
        self.partial = self.result.with_suffix(".partial.json")

    def check(self, header: Header) -> dict[str, Any] | None:
        """The result, if the evaluation has finished, else None. Writes nothing.

        Raises UserError if the files were made with another header, or by something else.
        """
        if self.result.exists():
            result = self._read(self.result)
            self._compare(result, header, "its results")
            return result
        if self.partial.exists():
            self._compare(self._read(self.partial), header, "its unfinished results")
        else:
            for path in (self.records, self.table):
                if path.exists():
                    raise UserError(f"--out {self.result}: {path} exists already; give another --out, or remove it")
        return None

    def time(self) -> datetime | None:
        """The time that the chat template used in this evaluation; None if it has not started or used none."""
        for file in (self.result, self.partial):
            if file.exists():
                time = _flat(self._read(file)).get("settings.time")
                return None if time is None else parse_time(time, str(file))
        return None

    def begin(self, header: Header, plan: list[list[tuple[str, str]]]) -> list[DoneProblem]:
        """Prepare for `append`; returns the problems that are already done, in the plan's order.

        plan: groups of (suite, problem id) that are written together. An incomplete group is done again, so that the
        result is the same as that of an uninterrupted evaluation.
        """
        done: dict[tuple[str, str], DoneProblem] = {}
        if self.records.exists():
            for line in self.records.read_text(encoding="utf-8").splitlines():
                problem = DoneProblem.from_line(line)
                if problem is not None:
                    done[problem.suite, problem.record.id] = problem
        kept = [done[key] for group in plan if all(key in done for key in group) for key in group]
        with writing(f"--out {self.result}", "give another file", UserError):
            self.result.parent.mkdir(parents=True, exist_ok=True)
            replace(self.partial, json.dumps(header, indent=1) + "\n")
            replace(self.records, "".join(problem.to_line() for problem in kept))
        can_go_on("the same command")
        return kept

    def append(self, problems: list[DoneProblem]) -> None:
        """Add finished problems; they are on the disk when this returns."""
        with writing(self.records, GO_ON, UserError):
            append(self.records, "".join(problem.to_line() for problem in problems))

    def finish(self, result: dict[str, Any]) -> None:
        """Write FILE.md and FILE.json; the evaluation is then finished."""
        with writing(self.result, GO_ON, UserError):
            replace(self.table, table(result))
            replace(self.result, json.dumps(result, indent=1) + "\n")
            self.partial.unlink()

    def _read(self, path: Path) -> dict[str, Any]:
        with said(f"--out {self.result}: {path} is not JSON", "give another --out", ValueError):
            values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise UserError(f"--out {self.result}: {path} holds no evaluation; give another --out")
        return values

    def _compare(self, there: dict[str, Any], header: Header, what: str) -> None:
        old, new = _flat({key: there.get(key) for key in header}), _flat(header)
        for key in [*new, *old]:
            if old.get(key) != new.get(key):
                raise UserError(
                    f"--out {self.result}: {what} were made with {key} {_shown(old.get(key))}, not "
                    f"{_shown(new.get(key))}; give the same settings, or another --out"
                )


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: one row per suite, in percent, then all settings that the numbers depend on."""
    samples = result["sampling"]["samples"]
    others = [j for j in next(iter(result["suites"].values()))["pass@k"] if j not in {"1", str(samples)}]
    titles = ["suite", "problems", f"mean@{samples} %", "s.e. over problems", "spread over samples"]
    titles += [f"pass@{j} %" for j in others]
    titles += [f"best@{samples} %", f"majority@{samples} %", "mean tokens", "truncated %"]
    rows = []
    for name, suite in result["suites"].items():
        shares = [suite["mean@k"], suite["stderr_problems"], suite["std_samples"]]
        shares += [suite["pass@k"][j] for j in others]
        shares += [suite["best@k"], suite["majority@k"]]
        cells = [name, str(suite["problems"]), *map(_percent, shares)]
        rows.append([*cells, f"{suite['mean_tokens']:.0f}", _percent(suite["truncated_frac"])])
    lines = [f"# {markdown_text(result['model'])}", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] + ["---:"] * (len(titles) - 1), *rows)]
    sampling, settings = result["sampling"], result["settings"]
    limit = "no limit" if sampling["top_k"] == 0 else str(sampling["top_k"])
    lines += [
        "",
        f"Sampling: temperature {sampling['temperature']}, top-p {sampling['top_p']}, top-k {limit}, at most "
        f"{sampling['max_new_tokens']} new tokens, {samples} samples per problem, seed {sampling['seed']}. "
        "A truncated response is wrong.",
        f"Prompts: {settings['prompt_format']}, thinking {settings['thinking']}. Grader: {settings['grader']}. "
        f"Engine: {settings['engine']}, {settings['dtype']}, on {settings['device']}.",
    ]
    return "\n".join(lines) + "\n"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
