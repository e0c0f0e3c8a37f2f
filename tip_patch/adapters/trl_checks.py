"""Which versions of TRL, and which of its trainers, selection supports. Importing this needs no TRL."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from opsd.utils.errors import UserError

# What setup.py's extra `trl` installs.
KNOWN = SpecifierSet(">=1.16,<1.17")
# TRL's trainers with which selection would be wrong, and why.
REFUSED = {
    "ServerDistillationTrainer": "its server sends a few log-probabilities per token, not the teacher's distribution",
    "AsyncDistillationTrainer": "its server sends a few log-probabilities per token, not the teacher's distribution",
    "IWOPDTrainer": "it weights each token by those before it: dropping some would change the others' weights",
    "GKDTrainer": "it divides by the dataset's token count, not by the number it trains on; its on-policy half is "
    "what DistillationTrainer does",
    "GOLDTrainer": "it divides by the dataset's token count, not by the number it trains on; with equal tokenizers "
    "DistillationTrainer does the same",
    "SDFTTrainer": "it averages over each answer separately, so there is no count of kept tokens to divide by",
    "SDPOTrainer": "it averages over each answer separately, so there is no count of kept tokens to divide by",
}


def check_installed() -> None:
    """Raises UserError if TRL is missing, or has a version that this adapter does not support."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"selection inside TRL needs trl{KNOWN}: pip install opsd-tip[trl]") from None
    if not KNOWN.contains(version, prereleases=True):
        raise UserError(
            f"trl {version} is installed; selection inside TRL supports trl{KNOWN}: pip install opsd-tip[trl]"
        )


def check_parameters(hooked: dict[Callable[..., Any], str]) -> None:
    """Raises UserError if one of the functions takes parameters other than those named."""
    for function, names in hooked.items():
        if (found := " ".join(inspect.signature(function).parameters)) != names:
            raise UserError(
                f"TRL's {function.__qualname__} takes ({found}) instead of ({names}); install trl{KNOWN} unchanged"
            )


def check_context(divergence: Any, names: tuple[str, ...], saved: int) -> None:
    """Raises UserError unless TRL's kernel keeps the attributes `names` and this number of tensors for its backward."""
    one_12 = torch.ones(1, 2, requires_grad=True)
    context = divergence.apply(one_12, torch.ones(3, 2), None, torch.ones(1, 2), torch.ones(3, 2), None, 1.0)[0].grad_fn
    lacking = [name for name in names if not hasattr(context, name)]
    if lacking or len(context.saved_tensors) != saved:
        raise UserError(
            f"TRL's {divergence.__name__} saves other tensors for its backward pass than trl{KNOWN}; install that"
        )


def check_trainer(trainer: Any, base: type) -> None:
    """Raises UserError for a trainer class that selection does not support."""
    names = [one.__name__ for one in getattr(trainer, "__mro__", ())]
    fits = isinstance(trainer, type) and issubclass(trainer, base)
    reason = next((REFUSED[name] for name in names if name in REFUSED), None)
    if reason is None and not fits:
        reason = "it is not one of TRL's distillation trainers"
    if reason is not None:
        raise UserError(f"{getattr(trainer, '__name__', trainer)}: {reason}; give trl.DistillationTrainer")
