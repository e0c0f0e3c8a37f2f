"""The paths that a run's settings name, looked at before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from opsd.utils.errors import UserError
from opsd.utils.paths import check_hub_cache, check_model_path, check_new_run, check_records_path, hub_answers

if TYPE_CHECKING:
    from opsd.config.schema import TrainConfig


def check_paths(config: TrainConfig) -> None:
    """The paths of a run that is to begin: its folder, both models, prompts, suites. Raises UserError."""
    check_new_run(Path(config.out))
    if not config.teachers and not config.teacher.model:
        raise UserError("no --teacher: give a model folder, self, or several as --teachers NAME=FOLDER")
    teachers = {f"--teachers {name}" if name else "--teacher": path for name, path in config.teacher_paths().items()}
    models = {"--student": config.student, **teachers}
    for flag, path in models.items():
        check_model_path(path, flag)
    if config.teacher.context is not None and not Path(config.teacher.context).is_file():
        raise UserError(f"--teacher.context {config.teacher.context}: no such file; give a text file")
    if config.environment.kind == "none":
        for path in (config.prompts, *(pair.partition("=")[2] for pair in config.eval.suite if "=" in pair)):
            check_records_path(Path(path))
    on_hub = {flag: path for flag, path in models.items() if not Path(path).is_dir()}
    if on_hub and not hub_answers():
        check_hub_cache(on_hub)
