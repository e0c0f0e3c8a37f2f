"""Who may import whom: no circle, no arrow that runs up, and the trainer knows no rule and no task by name."""

import ast
from pathlib import Path

import pytest

import opsd

ROOT = Path(opsd.__file__).parents[1]
# From the ground up: each may import what stands in the lines before its own.
FLOORS = [
    {"types", "utils"},
    {"config", "data", "selection"},
    {"distill", "hooks", "model"},
    {"engine", "estimate", "run"},
    {"rollout", "teacher", "viewer"},
    {"environments", "eval", "update"},
    {"build", "environments.travel", "grading"},
    {"metrics"},
    {"train"},
    {"__main__"},
]


def named_modules(tree: ast.AST):
    """Every module that an import names, and every text that names this project's packages in a call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            texts = (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
            yield from (text for text in texts if text.startswith(("opsd.", "tip_patch")))


def room(module: str) -> str:
    """The package or file directly under opsd/ that a module belongs to; environments have a room each."""
    words = module.split(".")[1:]
    inner = words[0] == "environments" and len(words) > 1 and (ROOT / "opsd" / "environments" / words[1]).exists()
    return ".".join(words[:2]) if inner else words[0]


def rooms():
    """Every file of opsd/, the room it is in, and what it names."""
    files = sorted((ROOT / "opsd").rglob("*.py"))
    assert len(files) > 60
    for file in files:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module != "opsd":
            yield file, room(module), set(named_modules(ast.parse(file.read_text())))


def test_every_arrow_runs_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for file, own, names in rooms():
        for name in names:
            if name.startswith("opsd.") and room(name) in floor and room(name) != own:
                assert floor[room(name)] < floor[own], f"{file} imports {name}"


def test_nothing_in_opsd_names_tip_patch():
    for file, _, names in rooms():
        assert not [name for name in names if name.startswith("tip_patch")], file


def test_the_trainer_names_no_environment():
    for file, own, names in rooms():
        if own != "environments.travel":
            assert not [name for name in names if name.startswith("opsd.environments.travel")], file


@pytest.mark.parametrize(
    "line", ["import tip_patch.selector", "from tip_patch import groups", "importlib.import_module('tip_patch.groups')"]
)
def test_the_walk_would_see_one(line):
    assert any(name.startswith("tip_patch") for name in named_modules(ast.parse(line)))
