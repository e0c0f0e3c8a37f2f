"""The environment: a model's first messages, the answers to its calls, the score of its plan. It keeps no state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opsd.environments.travel import words
from opsd.environments.travel.official import Official
from opsd.environments.travel.plan import Plan, parse_plan, plan_block
from opsd.environments.travel.prompts import system_prompt
from opsd.environments.travel.score import PlanScore, score_plan
from opsd.environments.travel.show import show
from opsd.environments.travel.task import DEEPPLANNING, TravelTask
from opsd.environments.travel.tools import CallError, find, read_call, schemas

Message = dict[str, str]


class TravelEnv:
    """Travel planning. deepplanning_root: a user's copy of the benchmark: its prompt, schemas and commonsense score.

    Raises UserError if deepplanning_root lacks a file that is needed. Nothing that a model writes raises.
    """

    def __init__(self, deepplanning_root: str | Path | None = None) -> None:
        self._official = None if deepplanning_root is None else Official(Path(deepplanning_root))

    def tool_schemas(self, task: TravelTask) -> list[dict[str, Any]]:
        """The nine tools for a chat template: the benchmark's own schemas for its tasks, if its folder is given."""
        if self._official is not None and task.source == DEEPPLANNING:
            return self._official.schemas(task.lang)
        return schemas()

    def reset(self, task: TravelTask) -> list[Message]:
        """The messages that an episode begins with."""
        if self._official is not None and task.source == DEEPPLANNING:
            system = self._official.system_prompt(task.lang)
        else:
            system = system_prompt(task)
        return [{"role": "system", "content": system}, {"role": "user", "content": task.query}]

    def call(self, name: Any, arguments: Any, task: TravelTask) -> str:
        """A tool's answer; a call that cannot be answered gets a line that says what to fix.

        arguments: a dict, or JSON text.
        """
        try:
            tool, read = read_call(name, arguments)
        except CallError as error:
            return str(error)
        return show(tool, read, find(tool, read, task.tables), task.lang)

    def score(self, final_text: str, task: TravelTask) -> PlanScore:
        """The score of a model's last message (or of a whole answer: the last plan after the last </think> counts)."""
        plan = self.parse(final_text, task)
        score = score_plan(plan, task.meta)
        if self._official is None or plan is None or task.source != DEEPPLANNING or task.db_dir is None:
            return score
        return self._official.with_commonsense(score, plan, task)

    def parse(self, final_text: str, task: TravelTask) -> Plan | None:
        """The plan in a text, or None."""
        block = plan_block(final_text)
        if block is None:
            return None
        return words.read_plan(block, task) if task.form == "words" else parse_plan(block)
