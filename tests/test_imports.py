"""The trainer knows nothing of this package: no import of it, written or by name, anywhere in opsd/."""

import ast
from pathlib import Path

import opsd

ROOT = Path(opsd.__file__).parent


def named_modules(tree: ast.AST):
    """Every module that an import names, and every text that names this package in a call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def test_nothing_in_opsd_imports_tip_patch():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for name in named_modules(ast.parse(file.read_text())):
            assert not name.startswith("tip_patch"), file


def test_the_walk_would_see_one():
    for line in (
        "import tip_patch.selector",
        "from tip_patch import groups",
        "importlib.import_module('tip_patch.selector')",
    ):
        assert any(name.startswith("tip_patch") for name in named_modules(ast.parse(line)))
