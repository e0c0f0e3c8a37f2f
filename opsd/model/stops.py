"""Which tokens end a turn: a model's, from its files, and a pair's, reconciled before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, GenerationConfig

from opsd.model.vocabulary import check_ends
from opsd.types import Stops
from opsd.utils.errors import UserError

_SAID = "∎said∎"
# Maximum number of stops named in a message; config.json has all.
NAMED = 6


def eos_token_ids(generation: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """Every id that ends a response, without duplicates: a generation config may name several (Llama 3, Qwen).

    Raises UserError for an invalid id.
    """
    given = None if generation is None else generation.eos_token_id
    ids = [*given] if isinstance(given, list) else [given]
    if given is not None and any(type(token) is not int or token < 0 for token in ids):
        raise UserError(
            f"{tokenizer.name_or_path}: eos_token_id {given!r} is not a token id; give whole numbers from 0 in its "
            "generation_config.json"
        )
    return list(dict.fromkeys(token for token in (*ids, tokenizer.eos_token_id) if token is not None))


def turn_ends(generation: GenerationConfig | None, tokenizer: Any, chat: bool) -> list[int]:
    """The ids of `eos_token_ids`; for chat prompts, also the token that the template puts after a turn."""
    ids = eos_token_ids(generation, tokenizer)
    end = end_of_turn(tokenizer) if chat else None
    return ids if end is None or end in ids else [*ids, end]


def end_of_turn(tokenizer: Any) -> int | None:
    """The control token that a chat template puts after the assistant's words; None if there is none."""
    if not tokenizer.chat_template:
        return None
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # a template is a program; errors on real prompts are reported elsewhere
        return None
    _, found, behind = text.rpartition(_SAID)
    first = tokenizer(behind.lstrip(), add_special_tokens=False).input_ids[:1] if found else []
    control = tokenizer.added_tokens_decoder.keys() - {tokenizer.unk_token_id}
    return first[0] if first and first[0] in control else None


def generation_of(path: str, trust: bool) -> GenerationConfig:
    """The generation config of a model folder whose weights are not in this process: served, or sharded over ranks."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=trust))


def stated_stops(tokens: Iterable[str], tokenizer: Any, vocab_size: int, flag: str) -> list[int]:
    """The ids of tokens that a flag names, by their spelling or their id. Raises UserError for one that is unknown."""
    vocabulary, ids = tokenizer.get_vocab(), []
    for token in tokens:
        encoded = tokenizer(token, add_special_tokens=False).input_ids
        if token in vocabulary:
            found = vocabulary[token]
        elif len(encoded) == 1 and encoded[0] != tokenizer.unk_token_id:
            found = encoded[0]
        elif token.isascii() and token.isdecimal():
            found = int(token)
        else:
            found = vocab_size
        if found >= vocab_size:
            raise UserError(f"{flag} {token!r}: the models share no such token; give one as spelled in the vocabulary")
        ids.append(found)
    return list(dict.fromkeys(ids))


def named(token: int, tokenizer: Any) -> str:
    """A token's spelling, with its id if the spelling is a number; the id alone if it has no spelling."""
    spelling = tokenizer.convert_ids_to_tokens(token)
    if spelling is None:
        return f"id {token}"
    return f"{spelling} (id {token})" if spelling.isdecimal() else spelling


@dataclass(frozen=True)
class PairStops:
    """The tokens with which each model ends a turn, and the chosen stops. stated: by the user."""

    student: list[int]
    teacher: list[int]
    stops: Stops
    stated: bool = False

    @classmethod
    def from_json(cls, values: Any) -> PairStops | None:
        """The inverse of `dataclasses.asdict`; None for None."""
        if values is None:
            return None
        stops = Stops(tuple(values["stops"]["ids"]), bool(values["stops"]["joined"]))
        return cls(list(values["student"]), list(values["teacher"]), stops, bool(values["stated"]))

    def line(self, tokenizer: Any) -> str:
        """What was found and chosen, for the user."""

        def names(ids: Sequence[int]) -> str:
            more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
            return " ".join(named(token, tokenizer) for token in ids[:NAMED]) + more or "nothing"

        same = set(self.student) == set(self.teacher)
        if same:
            found = f"both models end with {names(self.student)}"
        else:
            found = f"the student ends with {names(self.student)}, the teacher with {names(self.teacher)}"
        if same and not self.stated:
            return f"stops: {found}"
        source = " (--rollout.stop_tokens)" if self.stated else ""
        one = ", which the loss merges into one token" if self.stops.joined else ""
        if not same and not one and len(self.stops.ids) > 1:
            one = ", which the loss keeps separate: a head with a soft cap has no logit for their sum"
        return f"stops: {found}; rollouts end with {names(self.stops.ids)}{source}{one}"


def reconcile(
    student: list[int], teacher: list[int], stated: list[int], vocab_size: int, joinable: bool = True
) -> PairStops:
    """The tokens that end a pair's rollouts: those stated by the user, else all with which either model ends a turn.

    The loss joins them if the two models end with different ones and their heads allow it (joinable). Raises
    UserError for a pair whose stops cannot be reconciled: a model cannot write any of its own, or the teacher has none
    and would train the student's stop away.
    """
    if not stated:
        check_ends(student, vocab_size, "--student")
        check_ends(teacher, vocab_size, "--teacher")
    student, teacher = ([token for token in ends if token < vocab_size] for ends in (student, teacher))
    if student and not teacher and not stated:
        raise UserError(
            "--teacher: it names no end token, so training would remove the student's; name one as eos_token_id in its "
            "generation_config.json, or give --rollout.stop_tokens"
        )
    differ = set(student) != set(teacher)
    ids = tuple(stated or dict.fromkeys([*student, *teacher]))
    return PairStops(student, teacher, Stops(ids, joinable and differ and len(ids) > 1), bool(stated))
