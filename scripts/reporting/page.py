"""report.html: one static page with every table and figure; no scripts, nothing loaded, all text escaped."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from string import Template

from reporting.tables import TextTable
from reporting.theme import Picture

FOLDER = Path(__file__).parent
BESIDE_THE_PAPER = (
    "<p>Ours beside the paper’s, from finished run folders. "
    '<span class="key">Columns in this tone are the paper’s.</span></p>'
)


@dataclass(frozen=True)
class Section:
    """One group of comparable runs on the page. title: of the group; empty if the page's title says it."""

    title: str
    remarks: list[str]
    tables: list[TextTable]
    pictures: list[Picture]

    def html(self) -> str:
        """Findings first, then the tables, then the figures."""
        findings = "".join(f"<li>{html.escape(line)}</li>" for line in self.remarks)
        heading = f"<h2>{html.escape(self.title)}</h2>" if self.title else ""
        return "\n".join(
            [
                f"<section>{heading}",
                f'<ul class="findings">{findings}</ul>',
                *(table.html() for table in self.tables),
                *(picture.html() for picture in self.pictures),
                "</section>",
            ]
        )


def page(title: str, sections: list[Section], note: str = BESIDE_THE_PAPER) -> str:
    """The whole page. note: HTML below the title."""
    return Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        note=note,
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        groups="\n".join(section.html() for section in sections),
    )
