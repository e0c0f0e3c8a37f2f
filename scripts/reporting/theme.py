"""The look of the page's figures: each is rendered in a light and a dark scheme and embedded in the page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Colormap, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from reporting.cells import CellName
from tip_patch.quadrants import QUADRANT_LABELS

# Okabe and Ito's colours, which colour-blind readers can distinguish; by selector, so that a rule looks the same.
COLOURS = {
    "all": "#7a7a7a",
    "entropy_sample": "#e69f00",
    "entropy": "#a6761d",
    "soft_or": "#0072b2",
    "soft_or_bottom": "#8c510a",
    "q3": "#cc79a7",
    "divergence": "#d55e00",
    "adaptive_kl": "#56b4e9",
    "random": "#999933",
    "first_fraction": "#6a51a3",
    "position_weighted": "#2aa5b5",
    "verify": "#b2182b",
    "teachability": "#1b7837",
    "iw_opd": "#4d4d9f",
    "rock_bypass": "#c51b7d",
}
OTHER_COLOUR = "#009e73"
QUADRANT_COLOURS = tuple(label.colour for label in QUADRANT_LABELS)
# Shades of a rule's variants: mix its colour with the text's or the paper's, by how much.
TONES = (("ink", 0.0), ("paper", 0.5), ("ink", 0.5), ("paper", 0.75), ("ink", 0.75), ("paper", 0.3))
INK = {"light": "#1d2126", "dark": "#e6e4df"}
SOFT = {"light": "#5d6670", "dark": "#9aa3ad"}


@dataclass(frozen=True)
class Picture:
    """A figure of the page: its caption, a description, both renderings as SVG, and the function that draws it."""

    title: str
    words: str
    light: bytes
    dark: bytes
    draw: Callable[[], Figure]

    def png(self) -> bytes:
        """The figure as a PNG file."""
        return png(self.draw)

    def html(self) -> str:
        """HTML that shows the rendering for the reader's colour scheme."""
        return (
            f"<figure><figcaption><b>{html.escape(self.title)}</b> {html.escape(self.words)}</figcaption><picture>"
            f'<source media="(prefers-color-scheme: dark)" srcset="{_uri(self.dark)}">'
            f'<img alt="{html.escape(f"{self.title} {self.words}")}" src="{_uri(self.light)}"></picture></figure>'
        )


def picture(title: str, words: str, draw: Callable[[], Figure]) -> Picture:
    """Render `draw` in both schemes; it draws under the current matplotlib settings."""
    how = {"format": "svg", "transparent": True, "metadata": {"Date": None, "Creator": None}}
    return Picture(title, words, _render(draw, "light", **how), _render(draw, "dark", **how), draw)


def png(draw: Callable[[], Figure]) -> bytes:
    """The light rendering on white, 150 dots an inch."""
    return _render(draw, "light", format="png", dpi=150, facecolor="white")


def as_written(figure: Figure) -> Figure:
    """The figure with all text taken literally: a "$" in a user's name starts no formula."""
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and "$" in artist.get_text()):
        cast(Text, text).set_parse_math(False)
    return figure


def ink() -> str:
    """The colour of text in the scheme that is being drawn."""
    return plt.rcParams["text.color"]


def count_colours() -> Colormap:
    """Colours for counts in the scheme that is being drawn; larger counts stand out more from the paper."""
    name, lowest = ("viridis", 0.3) if ink() == INK["dark"] else ("viridis_r", 0.1)
    return ListedColormap(matplotlib.colormaps[name](np.linspace(lowest, 1.0, 256)))


def colour_of(selector: str) -> str:
    """A selector's colour."""
    return COLOURS.get(selector, OTHER_COLOUR)


def tones(cells: list[CellName]) -> dict[CellName, Any]:
    """Each cell's colour: its rule's, nearer to the ink or to the paper if the rule has several variants."""
    variants: dict[str, list[str]] = {}
    for cell in cells:
        known = variants.setdefault(cell.selector, [])
        known += [cell.variant] if cell.variant not in known else []
    return {cell: _toned(colour_of(cell.selector), variants[cell.selector].index(cell.variant)) for cell in cells}


def _toned(colour: str, number: int) -> Any:
    towards, share = TONES[number % len(TONES)]
    other = ink() if towards == "ink" else INK["light" if ink() == INK["dark"] else "dark"]
    return tuple((1 - share) * np.array(to_rgb(colour)) + share * np.array(to_rgb(other)))


def _render(draw: Callable[[], Figure], scheme: str, **how: Any) -> bytes:
    with matplotlib.rc_context(_settings(scheme)):
        figure = as_written(draw())
        file = io.BytesIO()
        figure.savefig(file, **how)
        plt.close(figure)
    return file.getvalue()


def _settings(scheme: str) -> dict[str, Any]:
    text, soft = INK[scheme], SOFT[scheme]
    return {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": text,
        "axes.labelcolor": soft,
        "axes.edgecolor": soft,
        "xtick.color": soft,
        "ytick.color": soft,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlecolor": text,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.hashsalt": "report",
    }


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
