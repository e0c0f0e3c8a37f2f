"""README and Makefile name only what exists."""

import re
import subprocess
from pathlib import Path

from opsd.config import TrainConfig
from opsd.config.cli import flags_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, flags=re.MULTILINE))


def test_readme_names_only_make_targets_that_exist():
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= TARGETS


def test_readme_names_only_files_that_exist():
    paths = re.findall(r"\b(?:scripts|recipes|examples|docs|constraints|assets|tests)/[\w./-]*\w", README)
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert paths and not missing


def test_readme_names_only_flags_that_exist():
    other = {"--help", "--resume", "--config", "--dump_config"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.]*\w", README))
    assert named - other <= set(flags_of(TrainConfig))


def test_recipes_page_names_only_variables_that_something_reads():
    readers = "".join(
        (ROOT / file).read_text()
        for file in ("recipes/common.sh", "recipes/grpo_teacher.sh", "scripts/setup.sh", "Makefile")
    )
    table = RECIPES.split("## Environment variables")[1]
    named = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", table))
    assert named and {name for name in named if name not in readers} == set()


def test_help_describes_every_target():
    shown = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    described = set(re.findall(r"^  make ([a-z0-9-]+) +\S", shown, flags=re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE.replace("\\\n", " "), flags=re.MULTILINE)
    assert phony and described == TARGETS == set(phony[1].split())


def test_makefile_names_only_files_that_exist():
    paths = re.findall(r"\b(?:scripts|recipes)/[\w./-]*\w", MAKEFILE)
    assert paths and all((ROOT / path).exists() for path in paths)
