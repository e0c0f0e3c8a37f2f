"""Tool calls in a model's text, and their answers as the tokens that a chat template adds after a turn."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

from jinja2 import TemplateError

from opsd.utils.errors import UserError, said

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HOW = 'Write <tool_call>{"name": TOOL, "arguments": {…}}</tool_call>.'
_MARK = "∎turn∎"
_TAG = re.compile(rf"<think>|</think>|{OPEN}\s*")
_CLOSED = re.compile(rf"\s*{CLOSE}")


@dataclass(frozen=True)
class Call:
    """A call as the model wrote it, unchecked; `error` says why it cannot be read at all."""

    name: Any = None
    arguments: Any = None
    error: str | None = None


def read_calls(text: str) -> list[Call]:
    """The calls of one turn, in order; [] if it makes none, so that it is the last turn.

    Hermes form: JSON between <tool_call> tags, any number of them. Plain form: a turn that consists of one JSON call
    or a list of them, fenced or not. Calls in the thinking part are ignored; a tag inside a JSON string is text. Never
    raises.
    """
    if whole := _plain_calls(text):
        return whole
    calls: list[Call] = []
    place = behind_thoughts = 0
    while tag := _TAG.search(text, place):
        place = tag.end()
        if tag[0].startswith(OPEN):
            call, place = _hermes_call(text, place)
            calls.append(call)
        elif tag[0] == "<think>":
            end = text.find("</think>", place)
            if end < 0:
                return calls
            place = end + len("</think>")
            behind_thoughts = behind_thoughts if calls else place
        else:
            calls, behind_thoughts = [], place
    return _plain_calls(text[behind_thoughts:]) or calls


def _hermes_call(text: str, start: int) -> tuple[Call, int]:
    """The call whose JSON begins at `start`, and the index at which to continue."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        value, end = None, start
    closed = _CLOSED.match(text, end)
    if closed and _is_call(value):
        return _call(value), closed.end()
    following = text.find(OPEN, end)
    if text.find(CLOSE, end, len(text) if following < 0 else following) >= 0:
        return Call(error=f"A tool call is not a JSON object with a name and arguments. {HOW}"), end
    return Call(error=f"A tool call was not closed. {HOW}"), end


def _plain_calls(said: str) -> list[Call]:
    body = said.strip()
    if body.startswith("```") and body.endswith("```"):
        body = body.removeprefix("```").removesuffix("```").strip().removeprefix("json").strip()
    if not body.startswith(("{", "[")):
        return []
    value = _json(body)
    values = value if isinstance(value, list) else [value]
    return [_call(each) for each in values] if values and all(_is_call(each) for each in values) else []


def _call(value: dict[str, Any]) -> Call:
    return Call(value["name"], value.get("arguments", value.get("parameters")))


def _is_call(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and "name" in value and ("arguments" in value or "parameters" in value)


def _json(text: str) -> Any:
    """The value of a JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def cut_middle(text: str, limit: int) -> str:
    """At most `limit` characters of a tool's output: its head and tail, and between them a note on what is missing.

    0 is no limit. The note does not count towards the limit.
    """
    if not limit or len(text) <= limit:
        return text
    head = limit - limit // 2
    tail = text[len(text) - limit // 2 :] if limit > 1 else ""
    return f"{text[:head]}\n… {len(text) - limit} characters left out …\n{tail}"


class ChatTurns:
    """Token ids that a chat template writes around a model's turns: an episode's opening, and the answers to a turn.

    Raises UserError for a tokenizer without a template, or whose template does not support tool messages.
    """

    def __init__(self, tokenizer: Any, thinking: bool) -> None:
        if not tokenizer.chat_template:
            raise UserError("the student's tokenizer has no chat template; tools need one, or tasks in the word form")
        self._tokenizer, self._thinking = tokenizer, thinking
        self._after_turn(["probe"])

    def opening(self, messages: list[dict[str, str]], tools: list[dict[str, Any]]) -> list[int]:
        """The episode's prompt. If the template does not support tools, they are listed in the system message."""
        text = self._render(messages, tools)
        if tools and tools[0]["function"]["name"] not in text:
            listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            told = f"{messages[0]['content']}\n\n# Tools\n\n<tools>\n{listed}\n</tools>\n\n{HOW}"
            text = self._render([{**messages[0], "content": told}, *messages[1:]], None)
        return self._ids(text)

    def answers(self, outputs: list[str], turn_ids: list[int]) -> list[int]:
        """The ids after a turn that made calls: the rest of its message, the outputs, the start of the next turn."""
        text = self._after_turn([self._harmless(output) for output in outputs])
        return self._ids(text.removeprefix(self._tokenizer.decode(turn_ids[-1:])))

    def _after_turn(self, outputs: list[str]) -> str:
        tools = [{"role": "tool", "content": output} for output in outputs]
        turns: list[dict[str, str]] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        _, found, text = self._render([*turns, *tools], None).partition(_MARK)
        place = 0
        for output in outputs:
            # Search after the previous one: searching for each from the start would take quadratic time.
            start = text.find(output, place)
            found = found and start >= 0
            place = start + len(output)
        if not found:
            raise UserError("the student's chat template drops tool messages; give a model whose template has them")
        return text

    def _harmless(self, output: str) -> str:
        """The output without control tokens and halves of surrogate pairs, because it may repeat the model's text."""
        for token in ("<|", *self._tokenizer.all_special_tokens):
            output = output.replace(token, f"{token[:1]} {token[1:]}")
        return output.encode("utf-8", "replace").decode()

    def _render(self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None) -> str:
        settings: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": self._thinking}
        with said("the student's chat template refuses tool messages", "give another model", TemplateError):
            return self._tokenizer.apply_chat_template(messages, tools=tools, **settings)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
