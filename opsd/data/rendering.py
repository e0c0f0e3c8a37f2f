"""Turns a record into token ids: by the chat template, or as raw text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from opsd.config.settings import PromptSettings
from opsd.utils.errors import UserError, said

# Roles that the last message of a prompt may have: after any other role the model is not expected to answer.
_ASKING = ("user", "tool", "function", "ipython", "observation")


@dataclass(frozen=True)
class PromptFormat:
    """How a record becomes token ids; the same for training, evaluation, student and teacher.

    kind: "chat" | "raw". thinking: "on" | "off", passed to the chat template. whose: its owner, for messages.
    max_tokens: longest prompt; overlong: "error" | "drop". limit_flag: the option that sets max_tokens, for messages.
    """

    kind: str = "chat"
    thinking: str = "off"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    max_tokens: int = 2048
    overlong: str = "error"
    limit_flag: str = "--rollout.max_prompt_tokens"
    whose: str = "student's"

    @classmethod
    def of(cls, settings: PromptSettings, **more: Any) -> PromptFormat:
        """The format that a command's settings describe; `more`: the other fields."""
        names = settings.prompt_field, settings.answer_field
        return cls(settings.prompt_format, settings.thinking, *names, **more)


def lookup(record: dict[str, Any], field: str, where: str, required: bool = True) -> Any:
    """A field by name, or by a dotted path such as reward_model.ground_truth."""
    value: Any = record
    for key in [field] if field in record else field.split("."):
        if not isinstance(value, dict) or key not in value:
            if required:
                raise UserError(f"{where} has no field {field!r}; it has: {', '.join(record)}")
            return None
        value = value[key]
    return value


def check_template(tokenizer: Any, how: PromptFormat) -> None:
    """Raises UserError if there is no chat template, or if it cannot follow `how.thinking`."""
    if how.kind != "chat":
        return
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; give --prompt_format raw, or a model with a template")
    ask: list[Any] = [{"role": "user", "content": "?"}]
    try:
        on, off = (
            tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False, enable_thinking=thinking)
            for thinking in (True, False)
        )
    except Exception:  # a template is a program
        # It may need more than one message; an error on a record is reported when the record is encoded.
        return
    if on != off:
        return
    always = "<think>" in on
    if how.thinking == "on" and not always:
        raise UserError("--thinking on: the chat template has no thinking mode; give --thinking off")
    if how.thinking == "off" and always:
        raise UserError("--thinking off: the chat template always starts with thinking; give --thinking on")


def encode(content: Any, tokenizer: Any, how: PromptFormat, where: str) -> list[int]:
    """A text or messages as token ids. Raises UserError, which begins with `where`, for an unusable prompt."""
    is_messages = isinstance(content, list) and all(_is_message(message) for message in content)
    if not content or not (isinstance(content, str) or is_messages):
        raise UserError(
            f"{where}: {how.prompt_field!r} is {short(content)}; give a text or a list of chat messages "
            "(each with a role and a content)"
        )
    if how.kind == "raw":
        if is_messages:
            raise UserError(f"{where} holds chat messages; give --prompt_format chat")
        _check_text([str(content)], where)
        ids = _encode_raw(str(content), tokenizer, where)
    else:
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if isinstance(content, list):
            messages = content
        _check_text([message["content"] for message in messages], where)
        _check_last(messages[-1], where)
        ids = _encode_chat(messages, tokenizer, how, where)
    if not ids:
        raise UserError(f"{where} encodes to no tokens; give a prompt that is not empty")
    return list(ids)


def _ids(text: str, tokenizer: Any, where: str, framed: bool = False) -> list[int]:
    """The text's tokens; framed: with the special tokens that the tokenizer adds around a text."""
    give = "change the text, or give a model whose tokenizer has all of its characters, or an unknown token"
    with said(f"{where}: the tokenizer cannot encode it", give):
        return tokenizer(text, add_special_tokens=framed).input_ids


def _encode_raw(text: str, tokenizer: Any, where: str) -> list[int]:
    """The text's tokens after the tokenizer's prefix, added only if the text lacks it; without an end token."""
    ids, framed = _ids(text, tokenizer, where), _ids(text, tokenizer, where, framed=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = next((n for n in range(len(framed) - len(ids) + 1) if framed[n : n + len(ids)] == ids), len(framed))
    if ids[:added] != framed[:added]:
        ids = framed[:added] + ids
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    # A text cannot continue after its end token, except if that is also the start token: then it begins a new text.
    while eos not in (None, bos) and ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Any, how: PromptFormat, where: str) -> list[int]:
    with said(f"{where} does not fit the {how.whose} chat template", "fix the messages"):
        text = rendered(messages, tokenizer, how)
    last = messages[-1]
    if last["role"] != "user" and not shows(text, last["content"]):
        raise UserError(
            f"{where}: the {how.whose} chat template leaves out the last message, of role {last['role']!r}; "
            "give messages that it shows"
        )
    return _ids(text, tokenizer, where)


def rendered(messages: list[dict[str, Any]], tokenizer: Any, how: PromptFormat) -> str:
    settings = {"add_generation_prompt": True, "enable_thinking": how.thinking == "on"}
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def shows(text: str, content: str) -> bool:
    """Whether a template's text contains a message's content, verbatim or as JSON; whitespace is ignored."""
    squeezed = "".join(text.split())
    return any("".join(form.split()) in squeezed for form in (content, json.dumps(content)[1:-1]))


def _check_last(message: dict[str, Any], where: str) -> None:
    """Raises UserError if the last message asks for no answer: it is an answer itself, or is empty."""
    if message["role"] not in _ASKING:
        raise UserError(
            f"{where} ends with a message of role {message['role']!r}: no answer can follow it; "
            "end the prompt with the user's message, and put an answer into a separate field"
        )
    if message["role"] == "user" and not message["content"].strip():
        raise UserError(f"{where} ends with an empty user message; give a question")


def _check_text(texts: list[str], where: str) -> None:
    """Raises UserError for half of a surrogate pair, which JSON can contain and no tokenizer accepts."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} contains half of a surrogate pair at character {error.start}; fix the text"
            ) from error


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
