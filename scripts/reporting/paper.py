"""The paper's numbers, read from assets/paper/tables.csv, and the meaning of its names."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from reporting.cells import CellName

FILE = Path(__file__).parents[2] / "assets" / "paper" / "tables.csv"
MISSING = "-"
MEMORY = "peak_memory"
TABLES = {
    "table3": "Table 3: entropy sampling",
    "table4": "Table 4: overconfident tokens alone (Q3)",
    "table5": "Table 5: all tokens, entropy sampling, Soft-OR",
    "table6": "Table 6: the top and the bottom half by Soft-OR",
    "table7": "Table 7: planning with tools",
    "table8_adaptive_kl": "Table 8 (v1): adaptive KL weights",
    "table8_divergence_only": "Table 8 (v4): divergence alone",
}


@dataclass(frozen=True)
class Layout:
    """One report: its title, the paper's tables next to it, and the axes along which rows may differ (cells.AXES)."""

    title: str
    tables: tuple[str, ...]
    axes: tuple[str, ...] = ()


SWEEPS = {
    "sweep_retention": Layout("Sweep over retention", ("table3", "table5", "table4", "table8_divergence_only")),
    "sweep_selector": Layout(
        "Sweep over selection rules",
        ("table5", "table4", "table8_divergence_only"),
        ("divergence", "horizon", "prompts"),
    ),
    "sweep_divergence": Layout("Sweep over the trained divergence", ("table5",), ("divergence",)),
    "sweep_quadrants": Layout("Rules by quadrant under each divergence", ("table5", "table4"), ("divergence",)),
    "sweep_normalise": Layout("Sweep over where min and max are taken", ("table5",)),
    "opsd_privileged": Layout("On-policy self-distillation: a teacher that sees the answer", ("table5",), ("teacher",)),
    "crisp": Layout("Self-distillation towards brevity", ("table5",), ("teacher",)),
    "multi_teacher": Layout("Several teachers", ("table5",)),
}
# Table 6's bottom half separates AdamW from SGD.
LAYOUTS = {
    **{name: Layout(title, (name,), ("optim",) if name == "table6" else ()) for name, title in TABLES.items()},
    **SWEEPS,
}
BENCHMARKS = {
    "math500": "MATH-500",
    "aime24": "AIME 2024",
    "aime25": "AIME 2025",
    "math_dapo": "MATH-DAPO",
    "deepplanning_travel": "DeepPlanning travel",
}
PAIRS = {
    "qwen3": "Qwen3\n8B → 4B",
    "llama": "Llama\n70B → 8B",
    "qwen25": "Qwen2.5\n14B → 1.5B",
    "agentic14": "Qwen3\n14B → 1.7B",
    "agentic32": "Qwen3\n32B → 1.7B",
    "unstated": "pair not\nstated",
}
# Our names for the paper's rows.
METHODS = {"entropy_sample+adaptive_kl": "adaptive_kl"}


@dataclass(frozen=True)
class Paper:
    """Some tables' rows of assets/paper/tables.csv, each a dict of its columns; a number in several tables occurs once.

    best: the rows of Figure 4 (best@16) if the table is the agentic one; else empty.
    """

    rows: list[dict[str, str]]
    best: list[dict[str, str]]

    @classmethod
    def read(cls, *tables: str) -> Paper:
        """The rows of `tables`, e.g. table5, in this order."""
        with FILE.open(newline="") as lines:
            rows = [{**row, "method": METHODS.get(row["method"], row["method"])} for row in csv.DictReader(lines)]
        best = [row for row in rows if row["table"] == "figure4" and "table7" in tables]
        own: dict[tuple[str, ...], dict[str, str]] = {}
        for row in sorted((row for row in rows if row["table"] in tables), key=lambda row: tables.index(row["table"])):
            own.setdefault((row["pair"], row["benchmark"], row["method"], row["retention"]), row)
        return cls(list(own.values()), best)

    @property
    def cells(self) -> list[CellName]:
        """The table's cells in the paper's order."""
        return list(dict.fromkeys(_cell(row) for row in self.rows))

    @property
    def baseline(self) -> CellName:
        """The cell that the table compares with: its first one, which is all tokens if the table has them."""
        return self.cells[0]

    @property
    def pairs(self) -> list[str]:
        """The table's model pairs in the paper's order."""
        return list(dict.fromkeys(row["pair"] for row in self.rows))

    @property
    def benchmarks(self) -> list[str]:
        """The table's benchmarks in the paper's order."""
        return list(dict.fromkeys(row["benchmark"] for row in self.rows if row["benchmark"] != MEMORY))

    @property
    def has_memory(self) -> bool:
        """Whether the table states peak memory."""
        return any(row["benchmark"] == MEMORY for row in self.rows)

    def benchmark_of(self, suite: str) -> str:
        """The benchmark that a suite of ours is compared with: its own, or the table's first."""
        return suite if suite in self.benchmarks else self.benchmarks[0]

    def number(self, pair: str, benchmark: str, cell: CellName) -> tuple[float, float | None] | None:
        """A value and the paper's ±, in the paper's unit; None if it has none."""
        row = _find(self.rows, pair, benchmark, cell)
        return None if row is None else (float(row["value"]), float(row["std"]) if row["std"] else None)

    def best_of(self, pair: str, benchmark: str, cell: CellName) -> float | None:
        """Figure 4's best@16, percent."""
        row = _find(self.best, pair, benchmark, cell)
        return None if row is None else float(row["value"])

    def value(self, pair: str, benchmark: str, cell: CellName) -> str:
        """One number with the paper's ±, as printed there, or "-"."""
        row = _find(self.rows, pair, benchmark, cell)
        return MISSING if row is None else f"{row['value']} ± {row['std']}" if row["std"] else row["value"]


def _cell(row: dict[str, str]) -> CellName:
    return CellName(row["method"], float(row["retention"]))


def _find(rows: list[dict[str, str]], pair: str, benchmark: str, cell: CellName) -> dict[str, str] | None:
    wanted = (pair, benchmark, cell)
    return next((row for row in rows if (row["pair"], row["benchmark"], _cell(row)) == wanted), None)
