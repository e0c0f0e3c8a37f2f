"""report.html: one static page with every table and figure; no script, nothing loaded, all text escaped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from reporting.tables import TextTable
from reporting.theme import Picture

FOLDER = Path(__file__).parent
BESIDE_THE_PAPER = (
    "<p>Ours beside the paper’s, from finished run folders. "
    '<span class="key">Columns in this tone are the paper’s.</span></p>'
)


@dataclass(frozen=True)
class Section:
    """One group of comparable runs on the page. title: of the group; empty where the page's own says it."""

    title: str
    remarks: list[str]
    tables: list[TextTable]
    pictures: list[Picture]


def page(title: str, sections: list[Section], note: str = BESIDE_THE_PAPER) -> str:
    """The whole page. note: HTML below the title."""
    pages = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True)
    return pages.get_template("page.html").render(title=title, note=Markup(note), sections=sections)
