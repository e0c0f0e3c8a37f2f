"""The benchmark's own prompt, tool schemas and commonsense score, loaded from a user's copy of it, never copied here.

Importing its whole evaluation package would import API clients; so only the three modules of rules that are needed are
loaded, each by itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import sys
import types
from functools import lru_cache
from pathlib import Path
from typing import Any

from opsd.environments.travel.plan import Plan
from opsd.environments.travel.score import PlanScore
from opsd.environments.travel.task import TravelTask, travel_folder
from opsd.utils.errors import UserError, said


class Official:
    """A user's copy of the benchmark's travel part. Raises UserError for a file that it lacks."""

    def __init__(self, root: Path) -> None:
        self._folder = travel_folder(root)

    def system_prompt(self, lang: str) -> str:
        """The benchmark's system message."""
        return self._module("agent", "prompts").get_system_prompt(lang)

    def schemas(self, lang: str) -> list[dict[str, Any]]:
        """The benchmark's nine tool schemas."""
        return json.loads(self._file("tools", f"tool_schema_{lang}.json").read_text(encoding="utf-8"))

    def hard(self, plan: Plan, meta: dict[str, Any]) -> dict[str, bool]:
        """The benchmark's verdict on each hard constraint, against which ours is tested."""
        verdicts = self._module("evaluation", "constraints_hard").eval_hard(plan.as_json(), meta)
        return {key: bool(held) for key, (held, _) in verdicts.items()}

    def with_commonsense(self, score: PlanScore, plan: Plan, task: TravelTask) -> PlanScore:
        """`score` with the benchmark's weighted commonsense score, in [0, 1].

        Its rules were written for plans that a language model has converted; if one of them fails, the plan scores 0
        and `problems` says why.
        """
        rules, scoring = (
            self._module("evaluation", "constraints_commonsense"),
            self._module("evaluation", "eval_converted"),
        )
        try:
            verdicts = rules.eval_commonsense(plan.as_json(), task.meta, task.db_dir)
            found = float(scoring.calculate_weighted_score(verdicts)["total_weighted_score"])
        except Exception as error:  # foreign code on a model's plan: the episode must go on
            problem = f"the benchmark's commonsense rules failed: {type(error).__name__}: {error}"
            return dataclasses.replace(score, commonsense=0.0, problems=[*score.problems, problem])
        return dataclasses.replace(score, commonsense=found)

    def _module(self, part: str, name: str) -> types.ModuleType:
        return load_module(self._file(part, f"{name}.py").parent, name)

    def _file(self, part: str, name: str) -> Path:
        file = self._folder / part / name
        if not file.is_file():
            raise UserError(
                f"{self._folder} holds no {part}/{name}; give a complete copy of the DeepPlanning travel part"
            )
        return file


@lru_cache(maxsize=16)
def load_module(folder: Path, name: str) -> types.ModuleType:
    """One module of a package folder, with its relative imports, without running the package's own __init__."""
    package = "opsd_user_copy_" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    if package not in sys.modules:
        shell = types.ModuleType(package)
        shell.__path__ = [str(folder)]
        sys.modules[package] = shell
    with said(f"{folder / name}.py cannot be imported", "install what it needs", ImportError):
        return importlib.import_module(f"{package}.{name}")
