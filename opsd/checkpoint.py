"""Checkpoints: a folder that transformers and vLLM load as it is, plus what the trainer needs to go on.

A checkpoint is written beside its place and renamed into it, so it is there whole or not at all. It holds no
random state: everything random is drawn from (run seed, step).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from opsd.errors import UserError
from opsd.lora import ADAPTER_FOLDER, save_adapters

_NAME = re.compile(r"step_(\d+)")
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint holds beside the model. step: optimiser steps done. selector: its state_dict."""

    step: int
    optimizer_tensors: dict[str, torch.Tensor]
    optimizer_values: dict[str, Any]
    selector: dict[str, Any]


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    state: TrainerState,
    keep: int,
    weights: dict[str, torch.Tensor] | None = None,
    adapters: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write `folder`/step_N, then remove all but the newest `keep`. Returns its path.

    weights: they stand for the model's own, where those are shards, rounded or without their adapters.
    adapters: what LoRA trains; `load_adapters` takes it up from the folder `adapter`, in peft's format.
    A kill at any moment leaves the older checkpoints untouched and at worst a folder named .tmp-*.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"step_{state.step}", folder / f"{_TEMPORARY}step_{state.step}"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    if adapters is not None:
        save_adapters(model, adapters, temporary / ADAPTER_FOLDER)
    trainer = temporary / "trainer"
    trainer.mkdir()
    save_file({name: t.contiguous() for name, t in state.optimizer_tensors.items()}, trainer / "optimizer.safetensors")
    values = {"step": state.step, "optimizer": state.optimizer_values, "selector": state.selector}
    (trainer / "state.json").write_text(json.dumps(values))
    for path in [*temporary.rglob("*"), temporary]:
        _to_disk(path)
    temporary.rename(target)
    _to_disk(folder)
    for old in _found(folder)[:-keep]:
        remove(old)
    return target


def remove(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a half-deleted one is never taken for whole."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. Left-overs of a kill are cleared away."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)
    found = _found(folder)
    return found[-1] if found else None


def load_state(path: Path) -> TrainerState:
    """The trainer's part of a checkpoint. Raises UserError where it is missing or damaged."""
    try:
        values = json.loads((path / "trainer" / "state.json").read_text())
        tensors = load_file(path / "trainer" / "optimizer.safetensors")
        return TrainerState(values["step"], tensors, values["optimizer"], values["selector"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error}); remove it to resume from the one before"
        ) from error


def _found(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    steps = {int(m[1]): p for p in folder.glob("step_*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()}
    return [steps[step] for step in sorted(steps)]


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
