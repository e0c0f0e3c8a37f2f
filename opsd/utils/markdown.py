"""Names and other foreign texts within Markdown."""

import html
import re


def markdown_text(text: str) -> str:
    """A text that Markdown shows as it is, on one line: no HTML, no code, no emphasis, no end of a table's cell."""
    plain = html.escape(" ".join(text.splitlines()), quote=False)
    # Underscores within a word, as in soft_or, are not emphasis.
    return re.sub(r"[\\`*~|\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain)
