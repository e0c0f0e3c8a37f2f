#!/usr/bin/env python
"""A pocket student that ends with a different token from its teacher: Table 5's rules with and without the remedy.

    python scripts/stops.py --runs runs/stops --out docs/results/stops.json --figure docs/stops.png

Makes the pair, runs the recipe twice, and writes numbers and figure. Finished cells are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.utils.errors import UserError, exits_on_bad_input
from reporting.cells import CellName
from reporting.runs import Run, read_runs
from reporting.theme import png, tones

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "assets" / "pocket"
END = "<end>"
# Additional flags: none; or the student's own end token alone, as without the comparison of end tokens.
ARMS = {"defaults": (), "student's end token alone": ("--rollout.stop_tokens", END)}
SHOWN = (
    ("length/mean_tokens", "mean length of a rollout, tokens"),
    ("rollout/truncated_frac", "rollouts cut off, fraction"),
    ("rollout/reward", "reward of the step's rollouts"),
)
STOPS = ("student_prob", "teacher_prob", "delta_nats", "kept_frac", "score_percentile", "score_percentile_soft_or")
NUMBERS = [*(key for key, _ in SHOWN), *(f"stop/{name}" for name in STOPS)]


@torch.no_grad()
def make_pair(folder: Path, sureness: float) -> None:
    """The pocket pair with one more token, <end>. The student ends with it: the rows of its end token and of a token
    that it never writes are swapped, so it otherwise writes what the pocket student writes. The teacher never does.
    """
    for name in ("student", "teacher"):
        tokenizer: Any = AutoTokenizer.from_pretrained(POCKET / name, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(POCKET / name, trust_remote_code=False, use_safetensors=True)
        eos, never = tokenizer.eos_token_id, tokenizer.pad_token_id
        tokenizer.add_special_tokens({"additional_special_tokens": [END]})
        end = tokenizer.convert_tokens_to_ids(END)
        model.resize_token_embeddings(len(tokenizer))
        rows_VD = model.get_input_embeddings().weight
        rows_VD[end] = rows_VD[never]
        if name == "student":
            rows_VD[[end, eos]] = rows_VD[[eos, end]]
            rows_VD[end] *= sureness
            tokenizer.eos_token = END
            model.config.eos_token_id = model.generation_config.eos_token_id = end
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def train(runs: Path, arm: str, steps: int, problems: int) -> None:
    """Run the recipe's cells for one arm. Raises UserError if it fails."""
    pair = Path(os.path.relpath(runs / "pair", ROOT))
    models = ["--student", str(pair / "student"), "--teacher", str(pair / "teacher")]
    command = [str(ROOT / "recipes" / "table5_soft_or.sh"), *models, "--eval.limit", str(problems), *ARMS[arm]]
    folder = runs / arm.replace(" ", "_").replace("'", "")
    settings = {"SCALE": "pocket", "STEPS": str(steps), "SEEDS": "0", "RUNS": str(folder)}
    if subprocess.run(command, env={**os.environ, **settings}, check=False).returncode:
        raise UserError(f"{' '.join(command)} failed; the logs are in {folder}")


def numbers_of(run: Run) -> dict[str, Any]:
    """Accuracy before and after, metrics at the start and at the end, and the warnings with their steps."""
    before, after = run.evaluation("step_0"), run.final_evaluation
    assert before is not None and after is not None
    suites = {"before": before["suites"]["pocket"], "after": after["suites"]["pocket"]}
    found: dict[str, Any] = {
        when: {name: suite[name] for name in ("mean@k", "stderr_problems", "mean_tokens", "truncated_frac")}
        for when, suite in suites.items()
    }
    found["metrics"] = {key: [*logged[:1], *logged[-1:]] for key in NUMBERS if (logged := run.logged(key))}
    found["warned"] = {
        key.removeprefix("health/"): int(line["step"])
        for line in run.steps
        for key in line
        if key.startswith("health/")
    }
    return found


def draw(arms: dict[str, list[Run]]) -> Figure:
    """A column per metric, a line per cell: solid with the defaults, dotted without the remedy."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(3.3 * len(SHOWN), 4.0), layout="constrained")
    colours = tones(list(dict.fromkeys(run.cell for runs in arms.values() for run in runs)))
    for ax, (key, title) in zip(axes, SHOWN, strict=True):
        ax.set_title(title)
        ax.set_xlabel("step")
        for style, (arm, runs) in zip(("-", ":"), arms.items(), strict=True):
            for run in runs:
                points = [(line["step"], line[key]) for line in run.steps if key in line]
                width = 5 if len(points) > 20 else 1
                values = np.convolve([value for _, value in points], np.full(width, 1 / width), "valid")
                steps = [step for step, _ in points][width - 1 :]
                name = f"{_label(run.cell)}, {arm}"
                ax.plot(steps, values, style, color=colours[run.cell], lw=1.4 if style == "-" else 1.8, label=name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _label(cell: CellName) -> str:
    return cell.selector if cell.selector == "all" else f"{cell.selector} {100 * cell.retention:g} %"


def main(runs: Path, out: Path, figure: Path, steps: int = 60, problems: int = 64, sureness: float = 0.5) -> None:
    """Run both arms, and write their numbers and the figure.

    Args:
        runs: Folder for the pair and the run folders.
        out: JSON file for the numbers.
        figure: PNG file for the curves.
        steps: Optimiser steps of a run.
        problems: Problems that each run is evaluated on, of 256.
        sureness: Factor on the student's row of <end>: at 0.5 its mean probability of ending is 0.91; at 1 it is
            0.99999, and the gradient of the reverse KL nearly vanishes.
    """
    if not (runs / "pair" / "teacher").is_dir():
        make_pair(runs / "pair", sureness)
    arms: dict[str, list[Run]] = {}
    for arm in ARMS:
        train(runs.resolve(), arm, steps, problems)
        arms[arm] = read_runs(runs / arm.replace(" ", "_").replace("'", ""))
    found = {arm: {str(run.cell): numbers_of(run) for run in own} for arm, own in arms.items()}
    values = {"steps": steps, "problems": problems, "sureness": sureness, "seed": 0, "arms": found}
    out.write_text(json.dumps(values, indent=1) + "\n")
    figure.write_bytes(png(lambda: draw(arms)))


if __name__ == "__main__":
    with exits_on_bad_input("stops"):
        tyro.cli(main)
