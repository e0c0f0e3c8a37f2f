"""A run's settings as a file: YAML (JSON is YAML too) with what config.json has, turned into flags."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from opsd.config.cli import parse
from opsd.config.schema import TrainConfig, to_json
from opsd.config.teacher import TeacherConfig
from opsd.utils.errors import UserError, first_line

# What a run writes into config.json in addition to its settings.
OF_A_RUN = ("began", "extended")
_UNSET = TrainConfig(student="", teacher=TeacherConfig(model=""), prompts="", out="")


def with_file(args: list[str]) -> list[str]:
    """The arguments without --config FILE, and with the file's settings as flags unless the same flag is given.

    So a file is checked like flags, with the same messages. Raises UserError.
    """
    if "--config" not in args:
        return args
    place = args.index("--config")
    if place + 1 == len(args):
        raise UserError("--config names no file; give a YAML file, such as `opsd train --dump_config` prints")
    rest = args[:place] + args[place + 2 :]
    named = {word.partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    flags = _flags(_read(Path(args[place + 1])))
    return [
        word for flag, words in flags.items() if flag.replace("-", "_") not in named for word in (flag, *words)
    ] + rest


def dumped(args: list[str]) -> str:
    """Every setting of the run that these arguments describe, as YAML; models, prompts and folder may be left out."""
    words = with_file([word for word in args if word != "--dump_config"])
    config = parse(TrainConfig, words, "opsd train", unset=_UNSET)
    # The round trip through JSON turns tuples into lists.
    return yaml.safe_dump(json.loads(json.dumps(to_json(config))), sort_keys=False, allow_unicode=True)


def as_command(config: TrainConfig) -> str:
    """The command that starts such a run: the settings that differ from the defaults, as flags."""
    plain, flags = (_flags(json.loads(json.dumps(to_json(one)))) for one in (_UNSET, config))
    words = [word for flag, own in flags.items() if own != plain.get(flag) for word in (flag, *own)]
    return shlex.join(["opsd", "train", *words])


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else first_line(error)
        raise UserError(f"--config {file} cannot be read ({said}); give a YAML file") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file} holds no settings by name; `opsd train --dump_config` prints such a file")
    return {str(name): value for name, value in values.items() if name not in OF_A_RUN}


def _flags(values: dict[str, Any], part: str = "") -> dict[str, list[str]]:
    """Each flag and its words. A mapping is a part of the settings, except options, whose value is a mapping."""
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        flag = f"--{part}{name}"
        if isinstance(value, dict) and name != "options":
            found |= _flags(value, f"{part}{name}.")
        elif isinstance(value, dict):
            found |= {flag: [str(word) for pair in value.items() for word in pair]} if value else {}
        elif isinstance(value, list):
            found[flag] = [str(one) for one in value]
        else:
            # The teacher's model is given as --teacher itself.
            found[flag.removesuffix(".model")] = [str(value)]
    return found
