"""Travel tasks as conversations: the tokens that an episode begins with, and the reply to each turn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from opsd.environments.travel import words
from opsd.environments.travel.env import TravelEnv
from opsd.environments.travel.score import PlanScore
from opsd.environments.travel.task import TravelTask
from opsd.environments.travel.tools import CallError, find
from opsd.rollout.agent import Conversation
from opsd.rollout.tool_calls import ChatTurns, cut_middle, read_calls
from opsd.types import Prompt, Rollout
from opsd.utils.errors import UserError


@dataclass(frozen=True)
class TravelPrompt(Prompt):
    """A prompt with its task; its answer is the constraints' golds as JSON."""

    task: TravelTask

    def content(self) -> list[Any]:
        """The content of `Prompt`, and the trip and the tables that the tools read."""
        task = self.task
        return [*super().content(), task.lang, task.query, task.meta, task.form, task.source, task.tables]


class Talk(Conversation):
    """A conversation about travel tasks, in the form that each task has.

    tool_output_characters: maximum characters of one tool's output that the model sees (head and tail); 0: no limit.
    """

    def __init__(self, env: TravelEnv, tokenizer: Any, thinking: bool, tool_output_characters: int) -> None:
        self._env, self._tokenizer, self._thinking = env, tokenizer, thinking
        self._limit = tool_output_characters
        self._turns: ChatTurns | None = None

    def prompt(self, task: TravelTask) -> TravelPrompt:
        """The episode's opening. Raises UserError if the tokenizer cannot encode the task."""
        if task.form == "words":
            ids = self._word_ids(task.query.split())
        else:
            ids = self._chat().opening(self._env.reset(task), self._env.tool_schemas(task))
        name = task.id if task.form == "words" else f"{task.lang}-{task.id}"
        return TravelPrompt(name, task.query, ids, json.dumps(task.constraints, ensure_ascii=False), task)

    def reply(self, prompt: Prompt, turn_ids: list[int]) -> list[int] | None:
        assert isinstance(prompt, TravelPrompt)
        if prompt.task.form == "words":
            return self._reply_in_words(prompt.task, turn_ids)
        calls = read_calls(self._tokenizer.decode(turn_ids, skip_special_tokens=True))
        if not calls:
            return None
        outputs = [call.error or self._env.call(call.name, call.arguments, prompt.task) for call in calls]
        return self._chat().answers([cut_middle(output, self._limit) for output in outputs], turn_ids)

    def score(self, rollout: Rollout) -> PlanScore:
        """The score of a rollout's last turn; an episode that was cut off has no plan."""
        assert isinstance(rollout.prompt, TravelPrompt)
        final = "" if rollout.truncated else self._tokenizer.decode(last_turn(rollout), skip_special_tokens=True)
        return self._env.score(final, rollout.prompt.task)

    def _reply_in_words(self, task: TravelTask, turn_ids: list[int]) -> list[int] | None:
        try:
            call = words.read_turn(self._tokenizer.convert_ids_to_tokens(turn_ids), task.meta)
        except CallError:
            return self._word_ids(words.show_error())
        if call is None:
            return None
        return self._word_ids(words.show_rows(call[0], find(*call, task.tables)))

    def _word_ids(self, spoken: list[str]) -> list[int]:
        ids = self._tokenizer.convert_tokens_to_ids(spoken)
        unknown = next((word for word, number in zip(spoken, ids, strict=True) if number is None), None)
        if unknown is not None or self._tokenizer.unk_token_id in ids:
            raise UserError(
                f"the student's tokenizer lacks words of the word form ({unknown or spoken[0]}); give its own models"
            )
        return ids

    def _chat(self) -> ChatTurns:
        if self._turns is None:
            self._turns = ChatTurns(self._tokenizer, self._thinking)
        return self._turns


def last_turn(rollout: Rollout) -> list[int]:
    """The ids that the student wrote after the environment's last token."""
    mask = rollout.by_student
    start = len(mask) - next((n for n, by_student in enumerate(reversed(mask)) if not by_student), len(mask))
    return rollout.response_ids[start:]
