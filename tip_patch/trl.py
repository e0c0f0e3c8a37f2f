"""TRL's own distillation script on selected tokens: `python -m tip_patch.trl --selector soft_or --retention 0.5 …`.

All other flags are TRL's (`trl distillation --help`). Under several processes: `accelerate launch -m tip_patch.trl …`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from opsd.utils.errors import UserError, exits_on_bad_input


def main(words: list[str]) -> None:
    """Train as TRL's script does. Raises UserError for invalid flags."""
    ours, theirs = _parser().parse_known_args(words)
    from tip_patch.adapters.trl import selecting

    from trl.scripts import distillation  # isort: skip

    options: dict[str, Any] = dict(_option(pair) for pair in ours.selector_option)
    if ours.retention is not None:
        options["retention"] = ours.retention
    with selecting(
        ours.selector,
        engine=ours.engine,
        seed=ours.selection_seed,
        telemetry_every=ours.telemetry_every,
        token_record=ours.token_record,
        **options,
    ):
        parser: Any = distillation.make_parser(prog="python -m tip_patch.trl")
        try:
            parts = parser.parse_args_and_config(theirs)
        except ValueError as error:
            raise UserError(f"{error}; `python -m tip_patch.trl --help` lists all flags") from error
        distillation.main(*parts)


def _parser() -> argparse.ArgumentParser:
    """Our flags; all others are TRL's."""
    parser = argparse.ArgumentParser(
        prog="python -m tip_patch.trl", description=__doc__, allow_abbrev=False, exit_on_error=False
    )
    add = parser.add_argument
    add("--selector", default="soft_or", help="selection rule: a name from `opsd selectors`, or module:Name")
    add("--retention", type=float, help="fraction of each answer's tokens that is kept, in (0, 1]; default: the rule's")
    add("--selector_option", action="append", default=[], metavar="NAME=VALUE", help="an additional option of the rule")
    add("--engine", default="kernel", help="kernel: TRL's own divergence (default); fused: ours")
    add("--selection_seed", type=int, help="seed of random choices; default: TRL's --seed")
    add(
        "--telemetry_every",
        type=int,
        help="steps between logs of quadrant shares and overlaps; 0: never; default: TRL's logging steps",
    )
    add("--token_record", metavar="DIR", help="new folder for a record of every token, which `opsd inspect DIR` shows")
    return parser


def _option(pair: str) -> tuple[str, str]:
    name, sign, value = pair.partition("=")
    if not sign:
        raise UserError(f"--selector_option {pair}: give NAME=VALUE")
    return name, value


if __name__ == "__main__":
    with exits_on_bad_input("tip_patch.trl"):
        main(sys.argv[1:])
