"""The teacher's own prompts: a text with the record's columns or a rewarded sample, in place of the student's prompt.

The teacher scores the student's response after it. So it may see the answer (on-policy self-distillation), another
sample that was rewarded (SDPO, arXiv 2601.20802), or an instruction that the student is to learn to follow without it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from opsd.data.rendering import PromptFormat, check_template, encode, lookup
from opsd.types import Prompt, Rollout
from opsd.utils.errors import DAMAGED, UserError, said

Content = str | list[dict[str, Any]]
SAMPLE = "rollout"
# Braces around anything but a column's name, as in \boxed{7} or {}, are kept as they are.
_NAME = re.compile(r"\{([A-Za-z_][\w.]*)\}")
_UNCLOSED = re.compile(r"\{prompt(?![\w.}])")
# Placeholder for a sample: a character that occurs in no text.
_OPEN = "\ufdd0"


class TeacherContext:
    """The text of a file, in which {prompt}, {answer} and any column stand for a record's values, {rollout} for a
    rewarded sample. It replaces the prompt's last message; earlier messages stay."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.named = names = set(_NAME.findall(text))
        self.takes_sample, self._columns = SAMPLE in names, names - {SAMPLE, "prompt", "answer"}

    @classmethod
    def read(cls, path: str) -> TeacherContext:
        """The file's text without trailing newlines. Raises UserError if it is unreadable, blank or names no column."""
        with said(f"--teacher.context {path} cannot be read as text", "give a text file", *DAMAGED):
            text = Path(path).read_text(encoding="utf-8-sig").rstrip("\n")
        if not text.strip():
            raise UserError(f"--teacher.context {path} is blank; give a text such as {{prompt}}, or omit the flag")
        context = cls(text)
        if not context.named:
            raise UserError(f"--teacher.context {path} names no column; give a text with {{prompt}}")
        if "prompt" not in context.named and (cut := _UNCLOSED.search(text)):
            raise UserError(f"--teacher.context {path}: {text[cut.start() :][:20]!r} lacks a brace; write {{prompt}}")
        return context

    def fill(self, content: Content, answer: str | None, column: Callable[[str], Any], where: str) -> Content:
        """The prompt's content with the context as its last message. column: returns the record's value of a column.

        Raises UserError, which begins with `where`, for a record that lacks a value that the text names.
        """
        question = content if isinstance(content, str) else content[-1]["content"]
        if answer is None and "{answer}" in self._text:
            raise UserError(f"{where} has no answer, which --teacher.context uses; give one, or another context")
        values = {"prompt": question, "answer": answer, SAMPLE: _OPEN}
        values |= {name: _plain(column(name), name, where) for name in self._columns}
        text = _NAME.sub(lambda named: str(values[named[1]]), self._text)
        return text if isinstance(content, str) else [*content[:-1], {**content[-1], "content": text}]


class TeacherPrompts:
    """How the teacher is asked. tokenizer: the teacher's, whose template renders the context. most: longest prompt of
    the teacher, in tokens."""

    def __init__(self, context: TeacherContext, tokenizer: Any, how: PromptFormat, most: int) -> None:
        self.context, self._tokenizer, self._most = context, tokenizer, most
        self._how = dataclasses.replace(how, whose="teacher's")
        self._render: Callable[[Any, Any], list[int]] = self._of_file
        check_template(tokenizer, self._how)

    def of_record(self, content: Content, answer: str | None, record: dict[str, Any], where: str) -> dict[str, Any]:
        """The additional fields of a prompt, for `load_prompts`. Raises UserError."""
        asked = self.context.fill(content, answer, lambda name: lookup(record, name, where), where)
        return self._fields(asked, partial(self._encode, asked, where))

    def of_episodes(self, prompts: list[Any], world: Any) -> list[Any]:
        """An environment's prompts with these fields; the context replaces the task's text. Raises UserError."""
        self._render = render = world.asked(self._tokenizer)
        found = []
        for prompt in prompts:
            column = partial(world.column, prompt)
            asked = self.context.fill(prompt.text, prompt.answer, column, f"task {prompt.id}")
            found.append(dataclasses.replace(prompt, **self._fields(asked, partial(render, prompt, asked))))
        return found

    def fitting(self, prompts: list[Any]) -> tuple[list[Any], int]:
        """The prompts that are short enough for the teacher, and the number of the others.

        Raises UserError if none is left.
        """
        kept = [prompt for prompt in prompts if len(prompt.teacher_ids or ()) <= self._most]
        if not kept:
            raise UserError(
                f"--teacher.max_prompt_tokens {self._most}: all {len(prompts)} prompts of the teacher are longer; "
                "raise it"
            )
        return kept, len(prompts) - len(kept)

    def longest(self, prompts: list[Any]) -> int:
        """Tokens of the longest prompt that the teacher may read."""
        return self._most if self.context.takes_sample else max(len(prompt.teacher_ids) for prompt in prompts)

    def with_samples(self, rollouts: list[Rollout], rewards: list[float] | None, samples: int) -> list[Rollout]:
        """The rollouts, each with a context that shows another sample of its prompt with the full reward, 1.

        samples: per prompt. Of several, the next by id whose context fits is used; so all are used about equally often.
        If there is none, the teacher reads the student's prompt. Nothing changes for a context without {rollout}.
        """
        if not self.context.takes_sample or rewards is None:
            return rollouts
        texts = [
            self._tokenizer.decode(rollout.response_ids, skip_special_tokens=True) if reward >= 1.0 else None
            for rollout, reward in zip(rollouts, rewards, strict=True)
        ]
        found = []
        for place, rollout in enumerate(rollouts):
            first = place - place % samples
            others = [texts[first + (place + k) % samples] for k in range(1, samples)]
            ids = self._first_that_fits(rollout.prompt, [text for text in others if text])
            found.append(dataclasses.replace(rollout, prompt=dataclasses.replace(rollout.prompt, teacher_ids=ids)))
        return found

    def _first_that_fits(self, prompt: Any, samples: list[str]) -> list[int] | None:
        contexts = (self._render(prompt, _put(prompt, sample)) for sample in samples)
        return next((ids for ids in contexts if len(ids) <= self._most), None)

    def _fields(self, asked: Content, ids: Callable[[], list[int]]) -> dict[str, Any]:
        return {"teacher_asked": asked} if self.context.takes_sample else {"teacher_ids": ids()}

    def _of_file(self, prompt: Prompt, asked: Content) -> list[int]:
        return self._encode(asked, f"prompt {prompt.id}")

    def _encode(self, asked: Content, where: str) -> list[int]:
        return encode(asked, self._tokenizer, self._how, f"{where}, as the teacher reads it,")


def _put(prompt: Prompt, sample: str) -> Content:
    """The prompt's context with a sample in place of {rollout}."""
    asked = prompt.teacher_asked
    assert asked is not None
    if isinstance(asked, str):
        return asked.replace(_OPEN, sample)
    return [*asked[:-1], {**asked[-1], "content": asked[-1]["content"].replace(_OPEN, sample)}]


def _plain(value: Any, name: str, where: str) -> Any:
    """A column's value, which must be a text or a number. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: {name!r} is neither a text nor a number; --teacher.context cannot name it")
    return value
