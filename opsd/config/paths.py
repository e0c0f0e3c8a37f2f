"""Checks the paths that a run's settings name before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from opsd.utils.errors import UserError
from opsd.utils.paths import check_hub_cache, check_model_path, check_new_run, check_records_path, hub_answers
from opsd.utils.plugins import ALL_TOKENS, check_selector_name

if TYPE_CHECKING:
    from opsd.config.schema import TrainConfig


def check_paths(config: TrainConfig) -> None:
    """Checks the folder, selector, models, prompts and suites of a new run. Raises UserError."""
    if not config.out:
        raise UserError("--out is empty; give a new folder")
    check_new_run(Path(config.out))
    check_selector_name(config.select.by)
    if config.select.by == ALL_TOKENS and (options := config.select.options):
        given = " ".join(word for pair in options.items() for word in pair)
        raise UserError(
            f"--select.options {given} with --select.by {ALL_TOKENS}, which takes no options: leave them out, or "
            "name a rule (`opsd selectors`)"
        )
    if not config.teachers and not config.teacher.model:
        raise UserError("--teacher is empty: give a model folder, self, or several as --teachers NAME=FOLDER")
    teachers = {f"--teachers {name}" if name else "--teacher": path for name, path in config.teacher_paths().items()}
    models = {"--student": config.student, **teachers}
    for flag, path in models.items():
        check_model_path(path, flag)
    if config.teacher.context is not None and not Path(config.teacher.context).is_file():
        raise UserError(f"--teacher.context {config.teacher.context}: no such file; give a text file")
    records = [config.prompts, *(pair.partition("=")[2] for pair in config.eval.suite if "=" in pair)]
    if config.environment.kind == "none":
        for path in records:
            if not path.startswith("hub:"):
                check_records_path(Path(path))
    on_hub = {flag: path for flag, path in models.items() if not Path(path).is_dir()}
    if (on_hub or any(path.startswith("hub:") for path in records)) and not hub_answers():
        check_hub_cache(on_hub)
