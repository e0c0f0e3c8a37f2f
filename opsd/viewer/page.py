"""HTML pages that stand alone: style and script inside, nothing loaded, hostile text harmless.

What a model wrote reaches a page as JSON in which no "<" is left, and the script shows it as text only. A content
policy forbids every connection and every script but the page's own (by its hash).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

FOLDER = Path(__file__).parent


def data_page(title: str, data: dict[str, Any]) -> str:
    """viewer.html with its style, its scripts and `data`, which they read from the element #data."""
    script = "\n".join(_read(name) for name in ("viewer_token.js", "viewer.js"))
    return Template(_read("viewer.html")).substitute(
        title=html.escape(title),
        policy=policy(script),
        style=_read("viewer.css"),
        data=embed(data),
        script=script,
    )


def policy(script: str) -> str:
    """A content security policy: inline styles, data: images, the one script; no connection, frame or form."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def embed(data: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in. Raises ValueError for NaN and infinities."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate is no Unicode text; a file could not hold it.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
