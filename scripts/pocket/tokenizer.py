"""The pocket tokenizer: a character is a token, 19 symbols, no chat template, nothing added when encoding."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pocket.task import SYMBOLS

EOS, PAD = "<eos>", "<pad>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """17 characters (ids 0–16), EOS (17) and padding (18). A character that is none of them is an error.

    Decoding joins tokens without blanks: the text comes back as it was.
    """
    vocabulary = {symbol: place for place, symbol in enumerate([*SYMBOLS, EOS, PAD])}
    # WordLevel refuses unknown characters only while its unknown token is not in the vocabulary.
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
