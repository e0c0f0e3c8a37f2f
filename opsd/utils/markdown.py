"""Escapes names and other texts for Markdown."""

import html
import re


def markdown_text(text: str) -> str:
    """The text, escaped so that Markdown shows it literally, on one line: no HTML, code, emphasis or cell separator."""
    plain = html.escape(" ".join(text.splitlines()), quote=False)
    # Underscores within a word, as in soft_or, are not emphasis.
    return re.sub(r"[\\`*~|\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain)
