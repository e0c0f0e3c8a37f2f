"""Prompt files to token ids. Text is encoded once, here; afterwards only ids are passed on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from opsd.config.settings import PromptSettings
from opsd.data.hub import HubPlace
from opsd.types import Prompt
from opsd.utils.errors import UserError, first_line
from opsd.utils.paths import check_records_path
from opsd.utils.seeding import derive_seed

# Who may speak last in a prompt: behind anyone else's words no answer of the model is due.
_ASKING = ("user", "tool", "function", "ipython", "observation")
# In so many records messages are looked for that the template leaves out: it does so nearly everywhere.
LOOKED_AT = 1000


@dataclass(frozen=True)
class PromptFormat:
    """How a record becomes token ids; the same for training, evaluation, student and teacher.

    kind: "chat" | "raw". thinking: "on" | "off", handed to the chat template. whose: template, for messages.
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
        """As a command's settings say; `more` are the further fields."""
        names = settings.prompt_field, settings.answer_field
        return cls(settings.prompt_format, settings.thinking, *names, **more)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, or a place on the hub, as dicts. UserError where one cannot be read."""
    place = HubPlace.of(str(path))
    if place is not None:
        return [record for file in place.files() for record in read_records(file)]
    path = Path(path)
    check_records_path(path)
    if path.suffix == ".parquet":
        try:
            # Not by way of pandas, which makes 3 a 3.0 where another row has no value.
            records = pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as parquet ({first_line(error)}); give a complete file") from error
    else:
        records = list(_read_jsonl(path))
    if not records:
        raise UserError(f"{path} holds no records; give at least one prompt")
    return records


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    how: PromptFormat,
    more: Callable[[Any, str | None, dict[str, Any], str], dict[str, Any]] | None = None,
) -> tuple[list[Prompt], int]:
    """All prompts of a file in file order, and how many over-long ones were dropped.

    more: further fields of a prompt, from its content, answer, record and place.

    Raises UserError for a missing or malformed file, a field that is absent, a tokenizer without a chat
    template where one is needed, a template that cannot do what `how.thinking` says, a prompt over `how.max_tokens`
    (unless they are to be dropped).
    """
    check_template(tokenizer, how)
    prompts, dropped = [], 0
    for number, record in enumerate(read_records(path), start=1):
        where = f"{path} record {number}"
        content = lookup(record, how.prompt_field, where)
        ids = encode(content, tokenizer, how, where)
        if len(ids) > how.max_tokens:
            if how.overlong == "drop":
                dropped += 1
                continue
            raise UserError(
                f"{where} has {len(ids)} tokens, over {how.limit_flag} {how.max_tokens}; "
                "raise it, or give --rollout.overlong_prompts drop"
            )
        name = number - 1 if record.get("id") is None else record["id"]
        text = content if isinstance(content, str) else content[-1]["content"]
        answer = _answer(record, how, where)
        further = {} if more is None else more(content, answer, record, where)
        prompts.append(Prompt(str(name), text, ids, answer, **further))
    if not prompts:
        raise UserError(f"{path}: all {dropped} prompts are over {how.limit_flag} {how.max_tokens}; raise it")
    return prompts, dropped


def routed(field: str, names: Iterable[str]) -> Callable[[Any, str | None, dict[str, Any], str], dict[str, Any]]:
    """For `load_prompts`: the teacher of a prompt, which its record names in a field. Raises UserError for no name."""

    def more(content: Any, answer: str | None, record: dict[str, Any], where: str) -> dict[str, Any]:
        return {"teacher": checked_route(lookup(record, field, where), field, names, where)}

    return more


def checked_route(value: Any, field: str, names: Iterable[str], where: str) -> str:
    """A teacher's name. Raises UserError for one that no teacher has."""
    if value not in list(names):
        raise UserError(f"{where}: {field!r} is {_short(value)}; --teachers has {', '.join(names)}")
    return value


def digest(prompts: Iterable[Prompt]) -> str:
    """Of the prompts as they are asked and graded, in their order: 16 hexadecimal digits."""
    # Of one JSON list, a prompt at a time: those of an environment may carry megabytes.
    sha256 = hashlib.sha256(b"[")
    for number, prompt in enumerate(prompts):
        sha256.update((", " * bool(number) + json.dumps(prompt.content())).encode())
    sha256.update(b"]")
    return sha256.hexdigest()[:16]


class PromptStream:
    """The prompts of step 1, 2, …: a shuffle per epoch, a pure function of (seed, step).

    Step s takes the positions (s−1)·n … s·n−1 of an endless row of shuffled epochs; nothing is stored, so a
    resumed run sees what the uninterrupted one would have seen.
    """

    def __init__(self, prompts: list[Prompt], per_step: int, seed: int) -> None:
        self._prompts, self._per_step, self._seed = prompts, per_step, seed
        self._epoch, self._order = -1, []

    def take(self, step: int) -> list[Prompt]:
        """The prompts of 1-based `step`."""
        first = (step - 1) * self._per_step
        return [self._at(position) for position in range(first, first + self._per_step)]

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "prompts", epoch))
            self._order = torch.randperm(len(self._prompts), generator=generator).tolist()
            self._epoch = epoch
        return self._prompts[self._order[place]]


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON ({error}); give one object per line") from error
            if not isinstance(record, dict):
                raise UserError(f"{path} line {number} is a {type(record).__name__}; give one object per line")
            yield record


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


def _answer(record: dict[str, Any], how: PromptFormat, where: str) -> str | None:
    """The gold answer as text; None where there is none or it is blank."""
    answer = lookup(record, how.answer_field, where, required=False)
    if answer is None:
        return None
    finite = not isinstance(answer, float) or math.isfinite(answer)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not finite:
        raise UserError(f"{where}: {how.answer_field!r} is {_short(answer)}; give a text or a number, or nothing")
    return str(answer) if str(answer).strip() else None


def check_template(tokenizer: Any, how: PromptFormat) -> None:
    """Raises UserError where there is no template for chats, or where its thinking mode would not be the stated one."""
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
        # It may want more than one message; what it refuses in a record is said there.
        return
    if on != off:
        return
    always = "<think>" in on
    if how.thinking == "on" and not always:
        raise UserError("--thinking on: the chat template has no thinking mode; give --thinking off")
    if how.thinking == "off" and always:
        raise UserError("--thinking off: the chat template always starts with thinking; give --thinking on")


def encode(content: Any, tokenizer: Any, how: PromptFormat, where: str) -> list[int]:
    """A text or messages as token ids. Raises UserError, with `where`, for what cannot be asked."""
    is_messages = isinstance(content, list) and all(_is_message(message) for message in content)
    if not content or not (isinstance(content, str) or is_messages):
        raise UserError(
            f"{where}: {how.prompt_field!r} is {_short(content)}; give a text or a list of chat messages "
            "(each with a role and a content)"
        )
    if how.kind == "raw":
        if is_messages:
            raise UserError(f"{where} holds chat messages; give --prompt_format chat")
        _check_text([str(content)], where)
        ids = _encode_raw(str(content), tokenizer)
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


def _encode_raw(text: str, tokenizer: Any) -> list[int]:
    """What the text encodes to behind what the tokenizer puts in front, which the text may have already; no end."""
    ids, framed = tokenizer(text, add_special_tokens=False).input_ids, tokenizer(text).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = next((n for n in range(len(framed) - len(ids) + 1) if framed[n : n + len(ids)] == ids), len(framed))
    if ids[:added] != framed[:added]:
        ids = framed[:added] + ids
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    # Behind its end a text does not go on; where one token is both, it begins another one.
    while eos not in (None, bos) and ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Any, how: PromptFormat, where: str) -> list[int]:
    try:
        text = _rendered(messages, tokenizer, how)
    except Exception as error:  # a template is a program
        raise UserError(
            f"{where} does not fit the {how.whose} chat template ({first_line(error)}); fix the messages"
        ) from error
    last = messages[-1]
    if last["role"] != "user" and not _shows(text, last["content"]):
        raise UserError(
            f"{where}: the {how.whose} chat template leaves out the last message, of role {last['role']!r}; "
            "give messages that it shows"
        )
    return tokenizer(text, add_special_tokens=False).input_ids


def _rendered(messages: list[dict[str, Any]], tokenizer: Any, how: PromptFormat) -> str:
    settings = {"add_generation_prompt": True, "enable_thinking": how.thinking == "on"}
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def hidden_messages(path: str, tokenizer: Any, how: PromptFormat) -> list[str]:
    """A line where the chat template leaves messages out; the first LOOKED_AT records of a file tell."""
    found, records = [], read_records(path)[:LOOKED_AT]
    for number, record in enumerate(records, start=1):
        content = lookup(record, how.prompt_field, path)
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        text = _rendered(messages, tokenizer, how)
        # What an earlier answer thought is left out on purpose.
        hidden = [m["role"] for m in messages if not _shows(text, m["content"].rpartition("</think>")[2])]
        found += [f"record {number} lacks a message of role {hidden[0]!r}"] if hidden else []
    if not found:
        return []
    return [
        f"the chat template leaves out or changes messages in {len(found)} of {len(records)} prompts looked at: "
        f"{found[0]}; give messages or a template that shows them"
    ]


def _shows(text: str, content: str) -> bool:
    """Whether a template's text holds a message's content, as it stands or as JSON, whatever blanks it changed."""
    squeezed = "".join(text.split())
    return any("".join(form.split()) in squeezed for form in (content, json.dumps(content)[1:-1]))


def _check_last(message: dict[str, Any], where: str) -> None:
    """Raises UserError where the last message asks for no answer: it is one, or it says nothing."""
    if message["role"] not in _ASKING:
        raise UserError(
            f"{where} ends with a message of role {message['role']!r}: no answer can follow it; "
            "end the prompt with the user's message, and put an answer into a separate field"
        )
    if message["role"] == "user" and not message["content"].strip():
        raise UserError(f"{where} ends with an empty user message; give a question")


def _check_text(texts: list[str], where: str) -> None:
    """Raises UserError for half of a surrogate pair, which JSON can hold and no tokenizer reads."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} contains half of a surrogate pair at character {error.start}; fix the text"
            ) from error


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
