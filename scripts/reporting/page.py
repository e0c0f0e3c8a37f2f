"""report.html: one static page with every table and figure; no scripts, nothing loaded, all text escaped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from reporting.tables import TextTable
from reporting.theme import Picture

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """One group of comparable runs on the page. title: of the group; empty if the page's title says it."""

    title: str
    remarks: list[str]
    tables: list[TextTable]
    pictures: list[Picture]


def page(title: str, sections: list[Section], beside_the_paper: bool = True) -> str:
    """The whole page. beside_the_paper: whether columns are the paper's, which is said below the title."""
    pages = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True)
    return pages.get_template("page.html").render(title=title, sections=sections, beside_the_paper=beside_the_paper)
