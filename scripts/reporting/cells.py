"""The cells of a table and their names, by one rule for recipes, run folders and reports. Needs Python alone.

As a script it prints the names of a recipe's cells, one per line; each line of standard input holds a cell's flags.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

# Rules that scale by min and max (a user's own rule may, too): for others, normalise_over and clip_quantile change
# nothing. A test compares this list with the rules themselves, which take seconds to import.
NORMALISING = frozenset({"soft_or", "soft_or_bottom", "q3", "teachability"})
# What a table may compare besides rules: the settings that make up each axis.
AXES = {
    "divergence": ("loss", ("divergence", "beta", "entropy_threshold", "warmup_steps")),
    "optim": ("optim", ("kind", "lr", "beta1", "beta2", "eps")),
    "teacher": ("teacher", ("model", "weights", "ema", "every", "context", "max_prompt_tokens")),
    "horizon": ("rollout", ("horizon", "horizon_steps")),
    "prompts": ("loss", ("prompt_weights",)),
}
_SLUG = re.compile(r"(?P<selector>all|[^-]+)(?:-(?P<percent>\d+(?:\.\d+)?))?(?P<variant>(?:-.+)?)")


@dataclass(frozen=True)
class CellName:
    """One row of a table: a selection rule at a retention (fraction of tokens kept).

    variant: its other differences from the paper's row of that name, joined by "-", e.g. "running" or "sgd-lr=0.3".
    """

    selector: str
    retention: float
    variant: str = ""

    def __str__(self) -> str:
        rule = self.selector if self.selector == "all" else f"{self.selector} {100 * self.retention:g} %"
        return f"{rule} ({', '.join(self.words)})" if self.variant else rule

    @property
    def words(self) -> list[str]:
        """The variant's parts."""
        return re.split(r"-(?=[A-Za-z])", self.variant) if self.variant else []

    @property
    def slug(self) -> str:
        """Its name in recipes, e.g. soft_or-50-running."""
        rule = self.selector if self.selector == "all" else f"{self.selector}-{100 * self.retention:g}"
        return f"{rule}-{self.variant}" if self.variant else rule

    @classmethod
    def parse(cls, slug: str) -> CellName:
        """The inverse of `slug`. Raises ValueError for a text that is not a name."""
        found = _SLUG.fullmatch(slug)
        if found is None or (found["selector"] == "all") != (found["percent"] is None):
            raise ValueError(f"{slug}: give names as recipes have them, e.g. all soft_or-50 soft_or-50-running")
        return cls(found["selector"], float(found["percent"] or 100) / 100, found["variant"].removeprefix("-"))

    @classmethod
    def of(cls, config: dict[str, Any], axes: Iterable[str] = AXES) -> CellName:
        """The row that a run's configuration belongs to, if rows may differ along `axes`."""
        select = config["select"]
        variant = "-".join([*_selection(select), *off_axes(config, axes)])
        return cls(select["by"], 1.0 if select["by"] == "all" else float(select["retention"]), variant)


def off_axes(config: dict[str, Any], axes: Iterable[str]) -> list[str]:
    """How a run differs from the paper's setup, in words: reverse KL under AdamW, another model as teacher, whole
    answers, equal weights of prompts."""
    loss, optim, rollout = (config.get(part, {}) for part in ("loss", "optim", "rollout"))
    words = []
    if "divergence" in axes and (divergence := loss.get("divergence", "reverse_kl")) != "reverse_kl":
        words.append(divergence)
        words += [f"beta={beta:g}"] if divergence == "jsd" and (beta := float(loss.get("beta", 0.5))) != 0.5 else []
    if "optim" in axes and (kind := optim.get("kind", "adamw")) != "adamw":
        words += [kind, f"lr={float(optim.get('lr', 1e-6)):g}"]
    if "horizon" in axes and (horizon := float(rollout.get("horizon", 1.0))) != 1.0:
        words += [f"horizon={horizon:g}", f"steps={int(rollout.get('horizon_steps', 0))}"]
    if "prompts" in axes and (weights := loss.get("prompt_weights", "none")) != "none":
        words.append(weights)
    return words + (_teacher(config.get("teacher", {})) if "teacher" in axes else [])


def _teacher(teacher: dict[str, Any]) -> list[str]:
    """In words: the student teaches itself, or the teacher sees another prompt."""
    words = []
    if teacher.get("model") == "self":
        weights, every = teacher.get("weights", "initial"), int(teacher.get("every", 1))
        words += ["self", *([weights] if weights != "initial" else []), *([f"every={every}"] if every > 1 else [])]
    return words + ([f"context={PurePath(context).stem}"] if (context := teacher.get("context")) else [])


def _selection(select: dict[str, Any]) -> list[str]:
    """How a selection differs from the paper's of that name, in words; settings not given are the paper's."""
    words = []
    if select["by"] in NORMALISING or ":" in select["by"]:
        words += [scope] if (scope := select.get("normalise_over", "batch")) != "batch" else []
        quantile = float(select.get("clip_quantile", 0.98))
        words += [f"clip_quantile={quantile:g}"] if quantile != 0.98 else []
    words += [f"stop_token={how}"] if (how := select.get("stop_token", "as_scored")) != "as_scored" else []
    return words + [f"{name}={value}" for name, value in sorted(select.get("options", {}).items())]


def config_of(flags: str) -> dict[str, dict[str, Any]]:
    """The settings in a cell's flags, by part, as text."""
    config: dict[str, dict[str, Any]] = {}
    for setting in re.split(r"(?:^| )--", flags)[1:]:
        flag, *values = setting.split()
        # A flag without a dot is a part's main setting: --teacher is its model.
        part, _, name = flag.partition(".")
        name = name or "model"
        own = dict(zip(values[::2], values[1::2], strict=True)) if name == "options" else values[0]
        config.setdefault(part, {})[name] = own
    return config


if __name__ == "__main__":
    names = [CellName.of(config_of(line)).slug for line in sys.stdin]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        sys.exit(f"two cells are called {twice[0]}: they differ in settings that names do not show")
    print("\n".join(names))
