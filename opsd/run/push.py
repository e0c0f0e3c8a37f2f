"""`opsd push RUN OWNER/NAME`: uploads a run's newest checkpoint to the Hugging Face hub, with its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import HfHubHTTPError, LocalTokenNotFoundError, validate_repo_id
from tyro.conf import Positional, arg

from opsd.config.settings import Settings
from opsd.run import checkpoint
from opsd.run.folder import RunFolder
from opsd.utils.errors import UserError, first_line


@dataclass(frozen=True)
class PushConfig(Settings):
    """Upload a run's newest checkpoint to the hub: weights, tokenizer and model card, without the optimiser state."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    name: Annotated[Positional[str], arg(metavar="OWNER/NAME")]
    """Repository, OWNER/NAME; it is created if it does not exist."""
    private: bool = True
    """Whether a newly created repository is private."""
    message: str = ""
    """Commit message; empty: the run's name and the step."""


def push(config: PushConfig) -> str:
    """Upload, and return the commit's URL. Raises UserError if there is no checkpoint, or the hub refuses."""
    try:
        validate_repo_id(config.name)
    except HFValidationError as error:
        raise UserError(f"{config.name}: give OWNER/NAME ({first_line(error)})") from error
    if config.name.count("/") != 1:
        raise UserError(f"{config.name}: give OWNER/NAME")
    run = RunFolder.open(config.run)
    newest, _ = checkpoint.newest(run.checkpoints)
    if newest is None:
        raise UserError(f"{config.run} holds no checkpoint yet; train it first")
    step = checkpoint.step_of(newest)
    run.write_card(step)
    api = HfApi()
    try:
        api.create_repo(config.name, private=config.private, exist_ok=True)
        done = api.upload_folder(
            repo_id=config.name,
            folder_path=newest,
            ignore_patterns=["trainer/*"],
            commit_message=config.message or f"{config.run.resolve().name}, step {step}",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(
            f"push to {config.name}: {first_line(error)}; log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except Exception as error:
        # Without a network: errors of httpx, or of the copy that the hub's library includes.
        if type(error).__module__.startswith("httpx"):
            raise UserError(f"push to {config.name}: the hub cannot be reached ({first_line(error)})") from error
        raise
    return str(done.commit_url)
