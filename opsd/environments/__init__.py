"""Environments: episodes of several turns with tools, instead of single answers.

Each is found by its entry point in the group `opsd.environments`, like selectors; the trainer imports none of them.
"""

from collections.abc import Callable
from typing import Any, Protocol

from opsd.config import TrainConfig
from opsd.rollout import RolloutEngine
from opsd.utils.errors import UserError
from opsd.utils.plugins import installed

GROUP = "opsd.environments"


class Environment(Protocol):
    """Built from (config, tokenizer); raises UserError for unusable files.

    prompts: how the training episodes begin; dropped: number of prompts left out as too long. evaluator: the
    counterpart of `opsd.eval.evaluator.Evaluator`, which is for single answers.
    """

    prompts: list[Any]
    dropped: int
    evaluator: Any

    def episodes(self, engine: RolloutEngine) -> RolloutEngine:
        """A sampler of whole episodes; `engine` samples each turn."""
        ...

    def asked(self, tokenizer: Any) -> Callable[[Any, str], list[int]]:
        """Returns a function of one of `prompts` and a text: the ids that its episode begins with if it asks the text.

        For a teacher with its own context; tokenizer: the teacher's.
        """
        ...

    def column(self, prompt: Any, name: str) -> Any:
        """The value of a prompt's task that a context shows as {name}; None if there is none."""
        ...


def load_environment(kind: str, config: TrainConfig, tokenizer: Any) -> Environment | None:
    """The environment of that name; None for "none". Raises UserError for an unknown name."""
    if kind == "none":
        return None
    found = installed(GROUP)
    if kind not in found:
        raise UserError(f"--environment.kind {kind}: give none, or one of {', '.join(found)}")
    return found[kind].load()(config, tokenizer)
