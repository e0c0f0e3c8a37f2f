"""`opsd inspect RUN`: a step's token record as one HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from opsd.config.settings import PositiveInt, Settings
from opsd.run.disk import writing
from opsd.utils.errors import UserError
from opsd.viewer.collect import collect, recorded_steps
from opsd.viewer.page import data_page


@dataclass(frozen=True)
class InspectConfig(Settings):
    """Show a step's rollouts as coloured text (entropy, divergence, quadrant, kept), in one HTML file that needs no
    network."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder; its tokens/ must hold a record (train with --telemetry.save_tokens True)."""
    step: int | None = None
    """Which recorded step; the last one by default."""
    out: Path | None = None
    """File to write; RUN/inspect_step_N.html by default."""
    rollouts: PositiveInt = 200
    """Maximum number of rollouts shown."""
    tokens: PositiveInt = 200_000
    """Maximum number of tokens shown; beyond it whole rollouts are left out, and the page says how many. 10,000 tokens
    take about 1.5 MB."""


def inspect(config: InspectConfig) -> Path:
    """Write the page and return its path. Raises UserError if the run holds no such record."""
    steps = recorded_steps(config.run)
    step = steps[-1] if config.step is None else config.step
    if step not in steps:
        raise UserError(f"--step {step} is not recorded in {config.run}; give one of: {', '.join(map(str, steps))}")
    data = collect(config.run, step, config.rollouts, config.tokens)
    out = config.out or config.run / f"inspect_step_{step}.html"
    with writing(f"--out {out}", "give another file", UserError):
        out.write_text(data_page(f"{data['run']} · step {step} · tokens", data), encoding="utf-8")
    return out
