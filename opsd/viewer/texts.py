"""Token ids to the text that a reader sees, each text stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opsd.model.loading import load_tokenizer

# Stands for bytes that are not a whole character.
BROKEN = "�"


class Texts:
    """The texts of a page: `number` gives a token's index in `all`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._numbers, self._texts = tokenizer, {}, []

    @classmethod
    def of_run(cls, run: Path, config: dict[str, Any]) -> Texts:
        """With the tokenizer of one of the run's checkpoints, or of its student. Raises UserError without either.

        It does not clean up unfinished checkpoints: the run may be writing its next one.
        """
        saved = sorted((run / "checkpoints").glob("step_*/tokenizer_config.json"))
        folder, trust = saved[-1].parent if saved else config["student"], config.get("trust_remote_code", False)
        return cls(load_tokenizer(str(folder), "the run's student", trust))

    def number(self, token: int) -> int:
        """The index of the token's text in `all`."""
        if token not in self._numbers:
            self._numbers[token] = len(self._texts)
            self._texts.append(self._text(token))
        return self._numbers[token]

    def whole(self, ids: list[int]) -> str:
        """A sequence of tokens as one text."""
        return self._tokenizer.decode(ids)

    def all(self) -> list[str]:
        """All texts so far."""
        return self._texts

    def _text(self, token: int) -> str:
        """The text of a token alone; for a part of a character, the vocabulary's own spelling of its bytes."""
        text, piece = self._tokenizer.decode([token]), self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"⟨{token}⟩"
        # SentencePiece: decoding a token alone drops the space in front of it.
        if piece.startswith("▁") and not text.startswith(" "):
            return " " + text
        return piece if BROKEN in text or not text else text
