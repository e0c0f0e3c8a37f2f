"""Turns prompt files into token ids. Text is encoded once, here; afterwards only ids are passed on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from opsd.data.hub import HubPlace
from opsd.data.rendering import PromptFormat, check_template, encode, lookup, rendered, short, shows
from opsd.types import Prompt
from opsd.utils.errors import DAMAGED, UserError, said
from opsd.utils.paths import check_records_path
from opsd.utils.seeding import derive_seed

# Number of records checked for messages that the template leaves out: a template that does so does it in nearly all.
LOOKED_AT = 1000


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, or of a hub: data set, as dicts. Raises UserError if one is unreadable."""
    place = HubPlace.of(str(path))
    if place is not None:
        return [record for file in place.files() for record in read_records(file)]
    path = Path(path)
    check_records_path(path)
    if path.suffix == ".parquet":
        with said(f"{path} cannot be read as parquet", "give a complete file", *DAMAGED):
            # Not through pandas, which turns 3 into 3.0 if another row has no value.
            records = pq.read_table(path).to_pylist()
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
    """All prompts of a file in file order, and the number of prompts dropped as too long.

    more: returns additional fields of a prompt, from its content, answer, record and the record's name for messages.

    Raises UserError for a missing or malformed file, an absent field, a tokenizer without a chat template if
    one is needed, a template that cannot do what `how.thinking` says, or a prompt over `how.max_tokens` (unless
    `how.overlong` is "drop").
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
    """For `load_prompts`: a prompt's teacher, named by a field of its record. Raises UserError for unknown names."""

    def more(content: Any, answer: str | None, record: dict[str, Any], where: str) -> dict[str, Any]:
        return {"teacher": checked_route(lookup(record, field, where), field, names, where)}

    return more


def checked_route(value: Any, field: str, names: Iterable[str], where: str) -> str:
    """`value`, a teacher's name. Raises UserError if no teacher has it."""
    if value not in list(names):
        raise UserError(f"{where}: {field!r} is {short(value)}; --teachers has {', '.join(names)}")
    return value


def digest(prompts: Iterable[Prompt]) -> str:
    """Hash of the prompts as they are asked and graded, in their order: 16 hexadecimal digits."""
    # The hash of one JSON list, fed prompt by prompt: an environment's prompts may have megabytes each.
    sha256 = hashlib.sha256(b"[")
    for number, prompt in enumerate(prompts):
        sha256.update((", " * bool(number) + json.dumps(prompt.content())).encode())
    sha256.update(b"]")
    return sha256.hexdigest()[:16]


class PromptStream:
    """The prompts of step 1, 2, …: a shuffle per epoch, a pure function of (seed, step).

    Step s takes positions (s−1)·n … s·n−1 of an endless sequence of shuffled epochs; nothing is stored, so a
    resumed run sees the prompts that an uninterrupted one would have seen.
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
            with said(f"{path} line {number} is not JSON", "give one object per line", ValueError, RecursionError):
                record = json.loads(line)
            if not isinstance(record, dict):
                raise UserError(f"{path} line {number} is a {type(record).__name__}; give one object per line")
            yield record


def _answer(record: dict[str, Any], how: PromptFormat, where: str) -> str | None:
    """The gold answer as text; None if it is missing or blank."""
    answer = lookup(record, how.answer_field, where, required=False)
    if answer is None:
        return None
    finite = not isinstance(answer, float) or math.isfinite(answer)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not finite:
        raise UserError(f"{where}: {how.answer_field!r} is {short(answer)}; give a text or a number, or nothing")
    return str(answer) if str(answer).strip() else None


def hidden_messages(path: str, tokenizer: Any, how: PromptFormat) -> list[str]:
    """A warning line if the chat template leaves messages out; only the first LOOKED_AT records are checked."""
    found, records = [], read_records(path)[:LOOKED_AT]
    for number, record in enumerate(records, start=1):
        content = lookup(record, how.prompt_field, path)
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        text = rendered(messages, tokenizer, how)
        # The thinking of an earlier answer is left out on purpose.
        hidden = [m["role"] for m in messages if not shows(text, m["content"].rpartition("</think>")[2])]
        found += [f"record {number} lacks a message of role {hidden[0]!r}"] if hidden else []
    if not found:
        return []
    return [
        f"the chat template leaves out or changes messages in {len(found)} of {len(records)} prompts checked: "
        f"{found[0]}; give messages or a template that shows them"
    ]
