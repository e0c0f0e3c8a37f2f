#!/usr/bin/env python
"""Problem files for `opsd train`, `opsd eval` and the recipes' DATA_DIR, from local files or the hub.

    python scripts/prepare_data.py --out data --decontaminate                       # all five sets, from the hub
    python scripts/prepare_data.py --out data --sets dapo=FILE.parquet math500=FILE.jsonl aime24=hub

Writes dapo_train.jsonl, math_dapo.jsonl (held out), math500.jsonl, aime24.jsonl, aime25.jsonl, gsm8k.jsonl with the
fields id, prompt and answer, and for each set NAME.counts.json: what was read, dropped and kept. docs/data.md says
what is dropped and why.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mathdata.clean import Counts, collect, split, without
from mathdata.problems import INSTRUCTIONS, Problem
from mathdata.sources import KNOWN, Source
from opsd.config.cli import parse
from opsd.config.settings import FractionBelowOne, Settings
from opsd.run.disk import replace, writing
from opsd.utils.errors import UserError, exits_on_bad_input

HELD_OUT_NAMES = {"dapo": "math_dapo"}
"""The paper's name for the held-out part of DAPO-Math-17k; for other sets it is NAME_held_out."""


@dataclass(frozen=True)
class Options(Settings):
    """Turn problem sets into prompt files."""

    out: Path
    """Folder to write to. An existing file with other content is an error."""
    sets: tuple[str, ...] = tuple(f"{name}=hub" for name in KNOWN)
    """NAME=PLACE pairs. PLACE: a .jsonl or .parquet file, hub (for dapo, math500, aime24, aime25, gsm8k), or
    hub:OWNER/NAME[:CONFIG]:SPLIT. The hub needs the package datasets."""
    columns: tuple[str, ...] = ()
    """NAME=PROBLEM,ANSWER: the columns of a set, if they have unusual names; a.b reaches into a struct."""
    train: str = "dapo"
    """The set to train on: split into NAME_train.jsonl and a held-out part. All others become suites."""
    held_out_fraction: FractionBelowOne = 0.2
    """Share of the training set that is held out, chosen by the hash of each problem's text (the base repository
    trains on 80 % of DAPO-Math-17k)."""
    decontaminate: bool = False
    """Remove training problems that also occur in one of the other sets."""
    instruction: Literal["boxed", "answer", "none"] = "boxed"
    """Text appended to each problem: ask for \\boxed{} (what the grader looks for first), for a last line
    "Answer: …" (it takes that too), or nothing."""

    def check(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; give a folder")


@dataclass(frozen=True)
class Prepared:
    """A set's output files, name to problems, and its counts."""

    source: Source
    files: dict[str, list[Problem]]
    counts: Counts


def prepare(options: Options) -> list[Prepared]:
    """Read, clean and split every set. Writes nothing. Raises UserError for sets that cannot be read."""
    sources = parse_sources(options)
    suites = [_suite(source) for source in sources if source.name != options.train]
    if options.decontaminate and not (suites and len(suites) < len(sources)):
        raise UserError(
            f"--decontaminate needs the training set {options.train!r} and at least one other in --sets; name both"
        )
    taken = {problem.key for suite in suites for problem in suite.files[suite.source.name]}
    train = [_train(source, options, taken) for source in sources if source.name == options.train]
    return train + suites


def _suite(source: Source) -> Prepared:
    problems, counts = _collect(source)
    expected = source.known.problems if source.known else None
    if expected is not None and len(problems) != expected:
        raise UserError(
            f"{source.name} from {source.place} gives {len(problems)} problems instead of {expected}; "
            "give a complete copy, or the set under another name"
        )
    return Prepared(source, {source.name: problems}, counts)


def _train(source: Source, options: Options, taken: set[str]) -> Prepared:
    problems, counts = _collect(source)
    if options.decontaminate:
        clean = without(problems, taken)
        counts["in_a_suite"] = len(problems) - len(clean)
        problems = clean
    train, held_out = split(problems, options.held_out_fraction)
    names = f"{source.name}_train", HELD_OUT_NAMES.get(source.name, f"{source.name}_held_out")
    counts |= {"train": len(train), "held_out": len(held_out)}
    return Prepared(source, {name: part for name, part in zip(names, (train, held_out), strict=True) if part}, counts)


def _collect(source: Source) -> tuple[list[Problem], Counts]:
    problems, counts = collect(source.rows(), doubtful=source.known is not None and source.known.answers == "dapo")
    if not problems:
        raise UserError(
            f"{source.name} from {source.place}: none of its {counts['rows']} rows is left; check its answers"
        )
    return problems, counts


def parse_sources(options: Options) -> list[Source]:
    """--sets and --columns as sources. Raises UserError for malformed pairs, or a set named twice."""
    columns: dict[str, tuple[str, str]] = {}
    for pair in options.columns:
        name, _, both = pair.partition("=")
        problem, _, answer = both.partition(",")
        if not (name and problem and answer):
            raise UserError(f"--columns {pair!r}: give NAME=PROBLEM,ANSWER, e.g. mine=question,solution")
        columns[name] = problem, answer
    sources: list[Source] = []
    for pair in options.sets:
        name, _, place = pair.partition("=")
        if not (name and place) or Path(name).name != name:
            raise UserError(f"--sets {pair!r}: give NAME=FILE or NAME=hub, e.g. math500=math500.jsonl")
        if name in {source.name for source in sources}:
            raise UserError(f"--sets names {name!r} twice; give each set once")
        sources.append(Source(name, place, columns.pop(name, None)))
    if columns:
        raise UserError(f"--columns names {min(columns)!r}, which is not in --sets; name the set in both")
    return sources


def as_jsonl(name: str, problems: list[Problem], instruction: str) -> str:
    """One {"id", "prompt", "answer"} per line. The id is made from the problem's text: the same for every copy."""
    lines = [
        {"id": f"{name}-{problem.digest[:12]}", "prompt": problem.text + instruction, "answer": problem.answer}
        for problem in problems
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def contents(prepared: list[Prepared], options: Options) -> dict[Path, str]:
    """Every file to write. Raises UserError if one exists already with other content."""
    files: dict[Path, str] = {}
    for one in prepared:
        about: dict[str, Any] = {"set": one.source.name, "place": one.source.place, "instruction": options.instruction}
        if one.source.name == options.train:
            about |= {"held_out_fraction": options.held_out_fraction, "decontaminate": options.decontaminate}
        files[options.out / f"{one.source.name}.counts.json"] = (
            json.dumps(about | {"counts": one.counts}, indent=1) + "\n"
        )
        for name, problems in one.files.items():
            files[options.out / f"{name}.jsonl"] = as_jsonl(
                one.source.name, problems, INSTRUCTIONS[options.instruction]
            )
    for path, text in files.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path} was made from other data or options; give another --out, or remove it")
    return files


def write(files: dict[Path, str]) -> None:
    """Write the files. Raises UserError if the folder cannot be written."""
    for path, text in files.items():
        with writing(f"--out {path.parent}", "give another folder", UserError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, text)


# How the counts are shown: sign in the sum, and meaning.
_LEDGER = {
    "rows": ("  ", "rows read"),
    "blank": ("− ", "rows without problem or answer"),
    "exact_copies": ("− ", "copies with the same text"),
    "spacing_copies": ("− ", "copies that differ in whitespace"),
    "notation_copies": ("− ", "copies that differ in math delimiters, punctuation or case"),
    "conflicting": ("− ", "problems whose copies disagree about the answer"),
    "minus_one": ("− ", "problems with the answer -1"),
    "rounded": ("− ", "problems with an answer beyond 2^53, rounded by a float"),
    "problems": ("= ", "problems"),
    "in_a_suite": ("− ", "problems that occur in a suite"),
    "train": ("→ ", "to train on"),
    "held_out": ("→ ", "held out"),
}


def show(prepared: list[Prepared]) -> None:
    """The counts of every set, as a sum that can be checked."""
    for one in prepared:
        print(f"{one.source.name} from {one.source.place}")
        for name, (sign, meaning) in _LEDGER.items():
            if name in one.counts and (one.counts[name] or sign != "− "):
                print(f"  {sign}{one.counts[name]:>9,}  {meaning}")
        if one.counts["instructions"]:
            print(f"     {one.counts['instructions']:>8,}  rows had an answer instruction, which was removed")
        print()


def main() -> None:
    """The command line."""
    with exits_on_bad_input("prepare_data"):
        options = parse(Options, sys.argv[1:], "prepare_data.py", bare_switches=True)
        prepared = prepare(options)
        files = contents(prepared, options)
        write(files)
    show(prepared)
    for path in files:
        print(path)


if __name__ == "__main__":
    main()
