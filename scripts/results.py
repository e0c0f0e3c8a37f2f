#!/usr/bin/env python
"""Finished runs as one small file, and the paper's claims judged by such files.

    python scripts/results.py collect runs/pocket --command "SEEDS='0 1 2' …" --out docs/results/pocket.json
    python scripts/results.py claims pocket=docs/results/pocket.json planning=docs/results/planning.json

`claims` reads docs/results/claims.json, where each claim stands with what was expected before the runs were made.
"""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import OmitSubcommandPrefixes, Positional, subcommand

from opsd.utils.errors import UserError, exits_on_bad_input
from reporting.claims import Verdict, judge, read_claims
from reporting.results import Results, collect
from reporting.tables import TextTable

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Collect:
    """Finished runs to one JSON file: each run's score on each problem."""

    runs: Positional[Path]
    """Folder that holds the run folders."""
    command: str
    """What made them, to be written down beside them."""
    out: Path
    """File to write."""
    repository: Path = ROOT
    """Checkout that ran them; its commit is written down."""


@dataclass(frozen=True)
class Claims:
    """The paper's claims, judged by files of results."""

    results: Positional[tuple[str, ...]]
    """NAME=FILE pairs, by the names that the claims call them."""
    claims: Path = ROOT / "docs" / "results" / "claims.json"
    """The claims."""
    markdown: bool = False
    """Print the table as Markdown."""


def write(args: Collect) -> None:
    """See Collect."""
    commit = subprocess.run(
        ["git", "-C", str(args.repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    values = collect(args.runs, commit, args.command)
    rows = ",\n".join("  " + json.dumps(run) for run in values.pop("runs"))
    head = json.dumps(values)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(f'{head[:-1]}, "runs": [\n{rows}\n]}}\n')


def show(args: Claims) -> None:
    """See Claims."""
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
    if args.markdown:
        print(table.markdown())
    else:
        # As wide as its rows: a verdict that a narrow terminal cuts off says nothing.
        console = Console(highlight=False)
        console.width = max(console.width, 130)
        console.print(table.rich())


def _row(verdict: Verdict) -> list[str]:
    difference = "-"
    if verdict.difference is not None and verdict.error is not None:
        error = f" ± {100 * verdict.error:.1f}" if math.isfinite(verdict.error) else ""
        points = round(100 * verdict.difference.mean, 1) + 0.0  # no −0.0
        difference = f"{points:+.1f}{error}".replace("-", "−")
    return [verdict.claim.says, verdict.claim.of, difference, str(len(verdict.seeds)), verdict.word]


def main(
    args: Annotated[Collect, subcommand("collect")] | Annotated[Claims, subcommand("claims")],
) -> None:
    """Results as data, and the claims judged by them."""
    write(args) if isinstance(args, Collect) else show(args)


if __name__ == "__main__":
    with exits_on_bad_input("results"):
        tyro.cli(main, config=(OmitSubcommandPrefixes,))
