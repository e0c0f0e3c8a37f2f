"""The travel environment of a run: task files for prompts, episodes for rollouts, plan scores for grades."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opsd.config import TrainConfig
from opsd.environments.travel.env import TravelEnv
from opsd.environments.travel.evaluate import TravelEvaluator
from opsd.environments.travel.talk import Talk, TravelPrompt
from opsd.environments.travel.task import read_task_file
from opsd.eval.evaluator import Suite, suite_pair
from opsd.rollout import HFRollout, RolloutEngine
from opsd.rollout.agent import AgentRollout
from opsd.rollout.cached_agent import CachedAgentRollout
from opsd.types import Prompt
from opsd.utils.errors import UserError


class TravelWorld:
    """The environment of a run with --environment.kind travel.

    prompts: the training tasks; dropped: number of tasks dropped as too long. Raises UserError for unusable files.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any) -> None:
        self._config = config
        self._env = TravelEnv(config.environment.deepplanning_root)
        self._talk = self._talk_by(tokenizer)
        self.prompts, self.dropped = self._load(config.prompts, drop=config.rollout.overlong_prompts == "drop")
        self._in_words = all(prompt.task.form == "words" for prompt in self.prompts)
        suites = [self._suite(pair) for pair in config.eval.suite]
        self.evaluator = TravelEvaluator(suites, config.eval, config.rollout.max_new_tokens, self._talk)

    def episodes(self, engine: RolloutEngine) -> RolloutEngine:
        """A sampler of episodes over `engine`; with one KV cache per episode for the word form and transformers."""
        turns = self._config.environment.max_turns
        if self._in_words and self._config.rollout.engine == "hf":
            assert isinstance(engine, HFRollout)
            return CachedAgentRollout(engine, self._talk, turns)
        return AgentRollout(engine, self._talk, turns)

    def asked(self, tokenizer: Any) -> Callable[[TravelPrompt, str], list[int]]:
        talk = self._talk_by(tokenizer)
        return lambda prompt, query: talk.prompt(dataclasses.replace(prompt.task, query=query)).ids

    def column(self, prompt: TravelPrompt, name: str) -> Any:
        """A task's own values, such as lang."""
        return prompt.task.to_json().get(name)

    def _talk_by(self, tokenizer: Any) -> Talk:
        return Talk(
            self._env, tokenizer, self._config.thinking == "on", self._config.environment.tool_output_characters
        )

    def _suite(self, pair: str) -> Suite:
        name, path = suite_pair(pair, "--eval.suite", "travel=data/travel/held_out.jsonl")
        prompts, _ = self._load(path, drop=False)
        if len({prompt.id for prompt in prompts}) < len(prompts):
            raise UserError(f"{path} holds a task twice; write it again with python -m opsd.environments.travel")
        problems: list[Prompt] = [*prompts[: self._config.eval.limit]]
        return Suite(name, problems)

    def _load(self, path: str, drop: bool) -> tuple[list[Any], int]:
        """A task file's prompts, and the number of tasks dropped as too long."""
        limit = self._config.rollout.max_prompt_tokens
        prompts, dropped = [], 0
        for task in read_task_file(Path(path)):
            task.check_database()
            prompt = self._talk.prompt(task)
            if len(prompt.ids) <= limit:
                prompts.append(prompt)
            elif drop:
                dropped += 1
            else:
                raise UserError(
                    f"{path}: task {prompt.id} opens with {len(prompt.ids)} tokens, over --rollout.max_prompt_tokens "
                    f"{limit}; raise it (the benchmark's own prompt needs 8192)"
                )
        if not prompts:
            raise UserError(f"{path}: all {dropped} tasks are over --rollout.max_prompt_tokens {limit}; raise it")
        return prompts, dropped
