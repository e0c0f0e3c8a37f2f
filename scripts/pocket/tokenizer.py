"""The pocket tokenizers: a character of a sum, or a word of a trip, is a token; no chat template, nothing added."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opsd.environments.travel.words import vocabulary
from pocket.task import SYMBOLS

SUM_TOKENS, TRIP_TOKENS = 64, 192
"""The longest sequence of each task."""


def sums_tokenizer() -> PreTrainedTokenizerFast:
    """17 characters (ids 0–16), EOS (17) and padding (18). Decoding joins tokens: the text comes back as it was."""
    return _tokenizer(SYMBOLS, SUM_TOKENS, pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse())


def trips_tokenizer() -> PreTrainedTokenizerFast:
    """Words are separated by blanks."""
    return _tokenizer(vocabulary(), TRIP_TOKENS, pre_tokenizers.WhitespaceSplit())


def _tokenizer(symbols: Iterable[str], longest: int, split: Any, join: Any = None) -> PreTrainedTokenizerFast:
    """Symbols, EOS and padding, in this order. An unknown symbol is an error."""
    known = {symbol: place for place, symbol in enumerate([*symbols, "<eos>", "<pad>"])}
    # WordLevel rejects unknown symbols only if its unknown token is not in the vocabulary.
    backend: Any = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = split
    if join is not None:
        backend.decoder = join
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
