"""Checks the paths of models, records and runs before the libraries that read them are loaded, which takes seconds."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from opsd.utils.errors import UserError

HUB_WAIT_S = 5.0


def model_name(model: str) -> str:
    """A model folder's or hub name's last part."""
    return Path(model.rstrip("/")).name or model


def check_model_path(path: str, flag: str) -> None:
    """Raises UserError unless the path is a folder with a config.json, or a hub name (owner/name)."""
    folder = Path(path)
    if not path:
        raise UserError(f"{flag} is empty; give a Hugging Face model folder")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{flag} {path}: no config.json there; give a Hugging Face model folder")
    elif folder.exists():
        raise UserError(f"{flag} {path}: is a file; give a Hugging Face model folder")
    elif path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"{flag} {path}: no such folder; give a Hugging Face model folder")


def check_model_name(path: str, flag: str) -> None:
    """Raises UserError unless the model is a folder, or on the hub or in its cache; takes only seconds offline."""
    check_model_path(path, flag)
    if not Path(path).is_dir() and not hub_answers():
        check_hub_cache({flag: path})


def check_records_path(path: Path) -> None:
    """Raises UserError unless the file of records exists and has a known format."""
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"prompt file {path} {wrong}; give a .jsonl or .parquet file")
    if path.suffix not in {".parquet", ".jsonl", ".json"}:
        raise UserError(f"{path} ends in {path.suffix!r}; give a .jsonl or .parquet file")


def check_new_run(path: Path) -> None:
    """Raises UserError if a new run cannot be put there: there is a run that trained a step, or something else."""
    try:
        if (begun := (path / "config.json").exists()) and not trained_nothing(path):
            raise UserError(f"--out {path} holds a run already; give --resume {path}, or another --out")
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; give a new folder")
        if path.exists() and not begun and any(path.iterdir()):
            raise UserError(f"--out {path} is not empty; give a new folder")
    except OSError as error:
        raise UserError(f"--out {path} cannot be made ({error.strerror}); give another folder") from error


def trained_nothing(path: Path) -> bool:
    """Whether a folder is that of a run that ended before its first step was complete: no step, no checkpoint."""
    if (path / "DONE").exists() or any((path / "checkpoints").glob("*step_*")):
        return False
    metrics = path / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return "student" in json.loads((path / "config.json").read_text()) and not any(line["step"] for line in lines)
    except (ValueError, TypeError, KeyError):
        # Damaged, or not a run's folder: the user must look at it.
        return False


def check_old_run(path: Path) -> None:
    """Raises UserError if there is no run."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no run there (config.json is missing); give a run folder")


def hub_answers() -> bool:
    """Whether the Hugging Face hub, or the one that HF_ENDPOINT names, can be reached."""
    try:
        hub = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        urllib.request.urlopen(hub, timeout=HUB_WAIT_S).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def check_hub_cache(names: dict[str, str]) -> None:
    """Checks that models are in the hub's cache, and makes the hub's library read only that, instead of retrying.

    names: hub names by their flags. Raises UserError.
    """
    # The library reads this when it is imported, so it must not be imported yet.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from huggingface_hub import try_to_load_from_cache

    for flag, name in names.items():
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise UserError(
                f"{flag} {name}: no such folder, not in the hub's cache, and the hub cannot be reached; "
                "give a Hugging Face model folder"
            )
