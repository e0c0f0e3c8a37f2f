"""Where models, records and runs lie: looked at before the libraries that read them are loaded, which takes seconds."""

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
    """A path must be a folder with a config.json, or a hub name (owner/name). Raises UserError."""
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
    """A model that is a folder here, or that the hub or its cache has. Raises UserError, offline in seconds."""
    check_model_path(path, flag)
    if not Path(path).is_dir() and not hub_answers():
        check_hub_cache({flag: path})


def check_records_path(path: Path) -> None:
    """A file of records must be there, and of a form that is read. Raises UserError."""
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"prompt file {path} {wrong}; give a .jsonl or .parquet file")
    if path.suffix not in {".parquet", ".jsonl", ".json"}:
        raise UserError(f"{path} ends in {path.suffix!r}; give a .jsonl or .parquet file")


def check_new_run(path: Path) -> None:
    """Raises UserError where no new run can be put: one that trained a step is there already, or something else is."""
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
    """Whether a run's folder is what a run leaves that ended before its first step did: no step, no checkpoint."""
    if (path / "DONE").exists() or any((path / "checkpoints").glob("*step_*")):
        return False
    metrics = path / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return "student" in json.loads((path / "config.json").read_text()) and not any(line["step"] for line in lines)
    except (ValueError, TypeError, KeyError):
        # Damaged, or no run's: to be looked at.
        return False


def check_old_run(path: Path) -> None:
    """Raises UserError where there is no run."""
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
    """Without the hub, what it named must be in its cache; its library then looks there alone, and not for minutes.

    names: hub names by their flags. Raises UserError.
    """
    # Read as the library is loaded: it must not be loaded yet.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from huggingface_hub import try_to_load_from_cache

    for flag, name in names.items():
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise UserError(
                f"{flag} {name}: no such folder, not in the hub's cache, and the hub cannot be reached; "
                "give a Hugging Face model folder"
            )
