#!/usr/bin/env python
"""Collect finished runs into one small file; use such files to judge the paper's claims, rank rules, compare cells.

    python scripts/results.py collect runs/pocket --command "SEEDS='0 1 2' …" --out docs/results/pocket.json
    python scripts/results.py claims pocket=docs/results/pocket.json planning=docs/results/planning.json
    python scripts/results.py leaderboard docs/results/pocket.json --markdown --figure leaderboard.png
    python scripts/results.py compare docs/results/pocket.json --cells q3-20 soft_or-20 --minus all

`claims` reads docs/results/claims.json, which holds each claim and the expectation set before the runs.
"""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, subcommand

from opsd.utils.errors import UserError, exits_on_bad_input
from reporting.claims import Verdict, judge, read_claims
from reporting.compare import compare, means
from reporting.leaderboard import gains_in, leaderboard, signed
from reporting.paper import MISSING
from reporting.plots import gains_against_retention
from reporting.results import Measure, Results, collect, with_earlier, write_results
from reporting.tables import TextTable
from reporting.theme import png

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Collect:
    """Finished runs to one JSON file: each run's score on each problem."""

    runs: Positional[Path]
    """Folder that holds the run folders."""
    command: str
    """The command that made them; recorded."""
    out: Path
    """File to write."""
    repository: Path = ROOT
    """Checkout that ran them; its commit is recorded."""
    earlier: tuple[Path, ...] = ()
    """Files that `collect` made of runs on the same problems: runs that the folder lacks are taken from them."""


@dataclass(frozen=True)
class Claims:
    """Judge the paper's claims by files of results."""

    results: Positional[tuple[str, ...]]
    """NAME=FILE pairs, with the names used in the claims."""
    claims: Path = ROOT / "docs" / "results" / "claims.json"
    """File of the claims."""
    markdown: bool = False
    """Print the table as Markdown."""


@dataclass(frozen=True)
class Leaderboard:
    """Rank rules by their gain or loss against all tokens, from a file of results."""

    results: Positional[Path]
    """A file that `collect` or scripts/real_bench.py made."""
    measure: str | None = None
    """One of the file's measures; none: its scores."""
    markdown: bool = False
    """Print the table as Markdown."""
    figure: Path | None = None
    """PNG to write: gain against retention."""


@dataclass(frozen=True)
class Compare:
    """Compare cells: better, worse, alike or inconclusive, by the rules of docs/questions.md."""

    results: Positional[Path]
    """A file that `collect` or scripts/real_bench.py made."""
    cells: tuple[str, ...]
    """Names of cells, e.g. soft_or-20."""
    minus: str | None = None
    """The cell that each is compared with; none: with every other one."""
    measure: str | None = None
    """One of the file's measures; none: its scores."""
    logged: tuple[str, ...] = ()
    """Logged metrics to show in a second table: q3_kept_frac, jaccard_entropy, kept_frac, …"""
    markdown: bool = False
    """Print the tables as Markdown."""


def write(args: Collect) -> None:
    """Gather the runs into a file of results."""
    commit = subprocess.run(
        ["git", "-C", str(args.repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    values = collect(args.runs, commit, args.command)
    for file in args.earlier:
        values = with_earlier(values, file)
    write_results(args.out, values, values.pop("runs"))


def rank(args: Leaderboard) -> None:
    """Print the leaderboard, and draw it."""
    results = Results.read(args.results)
    measure = results.measure(args.measure)
    gains = gains_in(results, args.measure)
    if not gains:
        raise UserError(f"{args.results} has no cell besides all tokens that shares a seed with them; run both")
    leaderboard(gains, measure).show(args.markdown)
    if args.figure is not None:
        args.figure.write_bytes(png(lambda: gains_against_retention(gains, measure)))


def contrast(args: Compare) -> None:
    """Print how the cells differ, and what they logged."""
    results = Results.read(args.results)
    compare(results, args.cells, args.minus, args.measure).show(args.markdown)
    means(results, args.cells, args.measure, args.logged).show(args.markdown)


def show(args: Claims) -> None:
    """Print what our runs say about each claim."""
    results = {}
    for word in args.results:
        name, equals, file = word.partition("=")
        if not equals:
            raise UserError(f"{word}: give NAME=FILE, e.g. pocket=docs/results/pocket.json")
        results[name] = Results.read(Path(file))
    claims, margin = read_claims(args.claims)
    rows = [_row(judge(claim, results, margin)) for claim in claims]
    table = TextTable(
        f"The paper's claims on our runs (± one standard error; margin {100 * margin:g} points)",
        ["claim", "of", "difference, points", "seeds", "verdict"],
        rows,
    )
    table.show(args.markdown)


def _row(verdict: Verdict) -> list[str]:
    error = math.nan if verdict.error is None else verdict.error
    difference = MISSING if verdict.difference is None else signed(verdict.difference.mean, Measure(), error)
    return [verdict.claim.says, verdict.claim.of, difference, str(len(verdict.seeds)), verdict.word]


def main(
    args: Annotated[Collect, subcommand("collect")]
    | Annotated[Claims, subcommand("claims")]
    | Annotated[Leaderboard, subcommand("leaderboard")]
    | Annotated[Compare, subcommand("compare")],
) -> None:
    """Collect results; judge claims, rank rules and compare cells by them."""
    act: Any = {Collect: write, Claims: show, Leaderboard: rank, Compare: contrast}[type(args)]
    act(args)


if __name__ == "__main__":
    with exits_on_bad_input("results"):
        tyro.cli(main, config=(OmitSubcommandPrefixes,))
