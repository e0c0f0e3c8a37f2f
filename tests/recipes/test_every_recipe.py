"""What holds for every recipe: it parses, stops at errors, quotes the paper rightly, and has the paper's cells."""

import csv
import importlib.metadata
import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from opsd.config import TrainConfig, to_json
from opsd.config.cli import flags_of, parse
from opsd.selection import load_selector
from reporting.paper import LAYOUTS
from reporting.runs import Run

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("table*.sh"))
SWEEPS = sorted(path.name for path in (ROOT / "recipes").glob("sweep_*.sh"))
TEACHERS = ["crisp.sh", "multi_teacher.sh", "opsd_privileged.sh"]
OTHERS = ["scripts/setup.sh", "scripts/slurm/train.sbatch", ".ci/run"]
# The name a cell has in tables.csv, where it is not our selector's.
PAPER_NAMES = {"adaptive_kl": "entropy_sample+adaptive_kl"}
with (ROOT / "assets" / "paper" / "tables.csv").open(newline="") as lines:
    PAPER = list(csv.DictReader(lines))


def table_of(recipe: str) -> str:
    found = re.search(r"^run_table (\w+)", (ROOT / "recipes" / recipe).read_text(), flags=re.MULTILINE)
    assert found
    return found[1]


def cells(lines: list[str]) -> list[dict[str, str]]:
    """The flags of every cell of a dry run, as a dict (of a flag with several values, the first)."""
    commands = [shlex.split(line) for line in lines if " train " in line]
    return [
        {word: value for word, value in itertools.pairwise(command) if word.startswith("--")} for command in commands
    ]


@pytest.mark.parametrize(
    "script",
    [*(f"recipes/{r}" for r in ["common.sh", *RECIPES, *SWEEPS, *TEACHERS, "grpo_teacher.sh"]), *OTHERS],
)
def test_every_script_parses(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize(
    "script", [*(f"recipes/{r}" for r in [*RECIPES, *SWEEPS, *TEACHERS, "grpo_teacher.sh"]), *OTHERS]
)
def test_every_script_stops_at_the_first_error(script):
    assert "\nset -euo pipefail\n" in (ROOT / script).read_text()


@pytest.mark.parametrize("recipe", [*RECIPES, *SWEEPS, *TEACHERS])
@pytest.mark.parametrize("scale", ["paper", "pocket"])
def test_every_flag_is_one_that_the_trainer_takes(printed, recipe, scale):
    commands = [line.split("opsd train ")[1] for line in printed(recipe, scale) if "opsd train " in line]
    named = {word for command in commands for word in shlex.split(command) if word.startswith("--")}
    assert commands and named <= set(flags_of(TrainConfig))


# What the trainer's own defaults make small, for a laptop; and the compute type, which they take from the machine.
SIZES = {"--rollout.samples_per_prompt", "--rollout.max_prompt_tokens", "--rollout.max_new_tokens", "--engine.dtype",
         "--engine.micro_batch_tokens", "--eval.samples", "--eval.generate_batch", "--telemetry.options"}  # fmt: skip


@pytest.mark.parametrize("recipe", [*RECIPES, *SWEEPS])
@pytest.mark.parametrize("scale", ["paper", "pocket"])
def test_every_size_is_stated_and_none_left_to_a_default(printed, recipe, scale):
    for line in printed(recipe, scale):
        if "opsd train " in line:
            assert set(shlex.split(line)) >= SIZES


@pytest.mark.parametrize("recipe", RECIPES)
def test_min_max_selectors_normalise_over_the_batch(printed, recipe):
    for flags in cells(printed(recipe, "pocket")):
        selector = load_selector(flags["--select.by"])
        min_max = selector is not None and getattr(selector, "normalises", False)
        assert (flags.get("--select.normalise_over") == "batch") == min_max


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "table7_agentic.sh"])
def test_the_cells_are_the_papers(printed, recipe):
    theirs = {(row["method"], float(row["retention"])) for row in PAPER if row["table"] == table_of(recipe)}
    ours = {
        (PAPER_NAMES.get(flags["--select.by"], flags["--select.by"]), float(flags.get("--select.retention", "1")))
        for flags in cells(printed(recipe, "pocket"))
    }
    assert ours == theirs


def test_a_cell_of_several_recipes_is_one_command_so_that_they_can_share_its_run(printed):
    commands: dict[str, dict[str, str]] = {}
    for recipe in [*RECIPES, *SWEEPS]:
        for words in (line for line in printed(recipe, "pocket") if " train " in line):
            flags = shlex.split(words)
            place = flags.index("--out") + 1
            command = words.replace(flags[place], "RUN").replace(str(Path(flags[place]).parent), "RUNS")
            if recipe != "table7_agentic.sh":  # another task, in a folder of its own
                commands.setdefault(Path(flags[place]).name, {})[command] = recipe
    assert len(commands) > 50
    assert {name: list(found.values()) for name, found in commands.items() if len(found) > 1} == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_quoted_in_the_header_stand_in_the_data_file(recipe):
    rows = [row for row in PAPER if row["table"] == table_of(recipe)]
    known = {row["value"] for row in rows} | {f"{row['value']} ± {row['std']}" for row in rows if row["std"]}
    header = (ROOT / "recipes" / recipe).read_text().split("set -euo")[0]
    text = " ".join(line.lstrip("# ") for line in header.splitlines())
    quoted = re.findall(r"(?<![\d.])\d+\.\d(?: ± \d+\.\d)?(?![\d.B])", text.replace("Qwen2.5", ""))
    assert quoted and set(quoted) <= known


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", [*RECIPES, *SWEEPS])
def test_a_runs_folder_and_the_reports_cells_have_the_name_that_the_report_gives_it(printed, recipe):
    lines = printed(recipe, "pocket")
    configs = [parse(TrainConfig, shlex.split(line)[2:], "opsd train") for line in lines if " train " in line]
    asked = next(shlex.split(line) for line in lines if "scripts/report.py" in line)
    axes = LAYOUTS[asked[asked.index("--table") + 1]].axes
    slugs = [Run(Path(config.out), to_json(config), done=True, axes=axes).cell.slug for config in configs]
    assert slugs and [Path(config.out).name for config in configs] == [f"pocket-{slug}-seed0" for slug in slugs]
    assert asked[asked.index("--cells") + 1 :] == slugs
    assert len({Run(Path(c.out), to_json(c), done=True, axes=axes).shared for c in configs}) == 1  # one table


def test_flags_of_the_users_own_make_the_report_show_all_cells(project):
    done = project.run("--select.normalise_over", "rollout", SCALE="pocket", DRY_RUN="1")
    assert "--cells" not in done.stdout


def test_the_sweep_of_rules_has_every_rule(printed):
    rules = {entry.name for entry in importlib.metadata.entry_points(group="opsd.selectors")}
    assert {flags["--select.by"] for flags in cells(printed("sweep_selector.sh", "pocket"))} == {"all", *rules}


def test_the_sweep_of_seeds_is_table_5_with_five_seeds(project):
    done = project.run(recipe="sweep_seeds.sh", SCALE="pocket", DRY_RUN="1")
    one = project.run(SCALE="pocket", DRY_RUN="1", SEEDS="0 1 2 3 4")
    assert done.stdout == one.stdout and done.stdout.count(" train ") == 25


@pytest.mark.e2e
def test_a_rule_of_ones_own_joins_the_sweep_of_rules_at_every_retention(project):
    common = {"recipe": "sweep_selector.sh", "SCALE": "pocket", "DRY_RUN": "1", "RETENTIONS": "0.5 0.1"}
    without = project.run(**common).stdout.splitlines()
    joined = project.run(**common, RULES="every mypackage.mod:MyRule").stdout.splitlines()
    new = [line for line in joined[:-1] if line not in without]
    assert [line.split("--select.")[1:] for line in new] == [
        ["by mypackage.mod:MyRule ", f"retention {retention}"] for retention in ("0.5", "0.1")
    ]
    # The report is told of all cells.
    assert "mypackage.mod:MyRule-50" in joined[-1] and "mypackage.mod:MyRule-10" in joined[-1]


def test_the_sweep_of_rules_runs_those_that_are_named(project):
    done = project.run(recipe="sweep_selector.sh", SCALE="pocket", DRY_RUN="1", RULES="soft_or,iw_opd")
    named = [line.split(" --out ")[1].split()[0] for line in done.stdout.splitlines() if " train " in line]
    cells = ("all", "soft_or-50", "iw_opd-50", "soft_or-20", "iw_opd-20", "iw_opd-100")
    assert named == [f"runs/sweep_selector/pocket-{cell}-seed0" for cell in cells]
