"""The vocabulary that tokenizer, student and teacher share: which ids are sampled and scored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from opsd.types import Head, Prompt
from opsd.utils.errors import UserError


def vocabulary_size(tokenizer: Any) -> int:
    """The tokenizer's largest id + 1; a model may have more rows."""
    return max(tokenizer.get_vocab().values()) + 1


def shared_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any, student: Head, teacher: Head) -> int:
    """How many vocabulary rows both models share, at most the tokenizer's largest id + 1.

    Heads are often padded to different heights (Qwen2.5: 152,064 and 151,936); rows past the tokenizer get no
    probability. Nor do ids that a model lacks, if no text encodes to them. Tokenizers agree when their id → token
    maps do. Raises UserError with the first difference.
    """
    check_tokenizers(student_tokenizer, teacher_tokenizer)
    heads = {"--student": student, "--teacher": teacher}
    return min(usable_rows(student_tokenizer, head.weight_VD.shape[0], flag) for flag, head in heads.items())


def check_tokenizers(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Raises UserError, with the first difference, if two tokenizers do not map the same tokens to the same ids."""
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        token = min((set(ours.items()) ^ set(theirs.items())), key=lambda item: (item[1], item[0]))[0]
        raise UserError(
            f"--student and --teacher have different tokenizers ({token!r} has id {ours.get(token, 'none')} and "
            f"{theirs.get(token, 'none')}); on-policy distillation needs one vocabulary"
        )


def model_vocabulary(tokenizer: Any, model: PreTrainedModel, flag: str) -> int:
    """How many vocabulary rows a model and its tokenizer share; see `usable_rows`."""
    head: Any = model.get_output_embeddings()
    return usable_rows(tokenizer, head.weight.shape[0], flag)


def usable_rows(tokenizer: Any, height: int, flag: str) -> int:
    """Rows of a head of `height` that the tokenizer has ids for.

    Raises UserError if text encodes to an id that the model has no row for.
    """
    size = vocabulary_size(tokenizer)
    for token, number in tokenizer.get_vocab().items():
        if number >= height and _is_written(tokenizer, token, number):
            raise UserError(
                f"{flag}: the model has {height} vocabulary rows, its tokenizer {size} ({token!r} has id {number}); "
                "they do not match"
            )
    return min(size, height)


def _is_written(tokenizer: Any, token: str, number: int) -> bool:
    """Whether text encodes to a token, or ends with it; neither holds for special tokens that only a processor adds."""
    if number == tokenizer.eos_token_id:
        return True
    added = tokenizer.added_tokens_decoder.get(number)
    if added is not None and added.special:
        return False
    return number in tokenizer(tokenizer.decode([number]), add_special_tokens=False).input_ids


def check_ids(prompts: Iterable[Prompt], vocab_size: int, where: str) -> None:
    """Raises UserError for a prompt with an id that a model has no row for."""
    for prompt in prompts:
        if (largest := max(*prompt.ids, *(prompt.teacher_ids or ()), -1)) >= vocab_size:
            raise UserError(
                f"{where}: prompt {prompt.id} holds token {largest}, the models know 0 to {vocab_size - 1} (a special "
                "token of the tokenizer that they lack); fix its text"
            )


def check_ends(ends: list[int], vocab_size: int, flag: str) -> None:
    """Raises UserError if a model cannot write any of the tokens that end a response."""
    if ends and min(ends) >= vocab_size:
        raise UserError(
            f"{flag}: its end tokens have ids {', '.join(map(str, ends))}, the model knows 0 to {vocab_size - 1}; "
            "name one that it knows as eos_token_id in its generation_config.json"
        )


def usable_ends(ends: list[int], vocab_size: int, flag: str) -> list[int]:
    """The end tokens that a model can write. Raises UserError like `check_ends`."""
    check_ends(ends, vocab_size, flag)
    return [token for token in ends if token < vocab_size]
