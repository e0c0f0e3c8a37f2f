"""How many tokens there are."""

from typing import Any


def vocabulary_size(tokenizer: Any) -> int:
    """The tokenizer's largest id + 1; a model may have more rows."""
    return max(tokenizer.get_vocab().values()) + 1
