"""Checkpoints: a folder that transformers and vLLM can load, plus what the trainer needs to resume.

A checkpoint is written under a temporary name and then renamed, so it is complete or missing; checksums of its files
reveal later damage. It has no random state: everything random is drawn from (run seed, step).
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from opsd.model.files import copy_rest
from opsd.model.lora import ADAPTER_FOLDER, save_adapters
from opsd.run.disk import damage, replace, to_disk, write_checksums, writing
from opsd.utils.errors import DAMAGED, said

_NAME = re.compile(r"step_(\d+)")
_TEMPORARY = ".tmp-"
_DAMAGED = "damaged-"
_CHECKSUMS = Path("trainer") / "checksums.json"
# The format of the optimiser state: torch's state of each parameter, not sharded, for every engine.
_OPTIMIZER = {"kind": "torch"}


@dataclass(frozen=True)
class TrainerState:
    """The part of a checkpoint besides the model. step: optimiser steps done. selector: its state_dict.

    metrics: the step's metrics before its evaluation. teacher: tensors of its state, if its weights follow the student.
    """

    step: int
    optimizer_tensors: dict[str, torch.Tensor]
    selector: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    teacher: dict[str, torch.Tensor] = field(default_factory=dict)


def place(folder: Path, step: int) -> Path:
    """The path of the checkpoint of `step`."""
    return folder / f"step_{step}"


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    state: TrainerState,
    keep: int,
    weights: dict[str, torch.Tensor] | None = None,
    adapters: dict[str, torch.Tensor] | None = None,
    source: Path | None = None,
) -> Path:
    """Write `folder`/step_N, then remove all but the newest `keep`. Returns its path.

    weights: replace the model's own, if those are shards, rounded or without adapters. adapters: LoRA's weights;
    `load_adapters` reads them from the folder `adapter`, in peft's format. source: the folder that the student came
    from; the model's other files there (processors, templates) are copied. If the process is killed at any moment, the
    older checkpoints are untouched and at most a folder .tmp-* is left. Raises RunStopped if it cannot be written.
    """
    target, temporary = place(folder, state.step), folder / f"{_TEMPORARY}step_{state.step}"
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _fill(temporary, model, tokenizer, state, weights, adapters, source)
        except BaseException:
            # Free the space, in case the disk is full.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        temporary.rename(target)
        to_disk(folder)
        for old in _found(folder)[:-keep]:
            remove(old)
    return target


def _fill(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    state: TrainerState,
    weights: dict[str, torch.Tensor] | None,
    adapters: dict[str, torch.Tensor] | None,
    source: Path | None,
) -> None:
    """Write a checkpoint's files, then their checksums; all are on the disk when this returns."""
    if weights is not None:
        # Saved buffers that are not trained, such as Gemma 4's scale of each layer.
        buffers = dict(model.named_buffers())
        weights = weights | {name: value for name, value in model.state_dict().items() if name in buffers}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if source is not None:
        copy_rest(source, folder)
    if adapters is not None:
        save_adapters(model, adapters, folder / ADAPTER_FOLDER)
    trainer = folder / "trainer"
    trainer.mkdir()
    for name, tensors in (("optimizer", state.optimizer_tensors), ("teacher", state.teacher)):
        if tensors or name == "optimizer":
            save_file({key: t.contiguous() for key, t in tensors.items()}, trainer / f"{name}.safetensors")
    values = {"step": state.step, "optimizer": _OPTIMIZER, "selector": state.selector}
    replace(trainer / "state.json", json.dumps({**values, "metrics": state.metrics}))
    write_checksums(folder, folder / _CHECKSUMS)
    for path in [*folder.rglob("*"), folder]:
        to_disk(path)


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("step_"))


def remove(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a partly deleted one is never mistaken for a complete one."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint in `folder`, or None; and one line per damaged one that is newer.

    Every file is read and compared with its checksum. A damaged checkpoint is renamed to damaged-step_N: it is kept
    for inspection and never used again. What a killed process has left behind is deleted.
    """
    with writing(folder):
        for leftover in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        skipped = []
        for path in reversed(_found(folder)):
            wrong = damage(path, path / _CHECKSUMS)
            if wrong is None:
                return path, skipped
            aside = path.with_name(f"{_DAMAGED}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            skipped.append(f"checkpoint {path} is damaged ({wrong}); renamed to {aside.name}")
    return None, skipped


def damaged(folder: Path) -> list[Path]:
    """The damaged checkpoints that `newest` has renamed, now or before."""
    return sorted(folder.glob(f"{_DAMAGED}*"))


def load_state(path: Path) -> TrainerState:
    """The trainer's part of a checkpoint. Raises UserError if it is missing or damaged."""
    give = "remove it to resume from the previous one"
    with said(f"checkpoint {path} cannot be read", give, SafetensorError, *DAMAGED):
        trainer = path / "trainer"
        values = json.loads((trainer / "state.json").read_text())
        if (kind := values["optimizer"]["kind"]) != _OPTIMIZER["kind"]:
            raise ValueError(f"optimiser state of unknown format {kind}")
        tensors, teacher = load_file(trainer / "optimizer.safetensors"), trainer / "teacher.safetensors"
        held = load_file(teacher) if teacher.exists() else {}
        return TrainerState(values["step"], tensors, values["selector"], values["metrics"], held)


def _found(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = {int(m[1]): p for p in folder.glob("step_*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()}
    return [steps[step] for step in sorted(steps)]
