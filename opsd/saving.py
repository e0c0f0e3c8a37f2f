"""When a run saves, where it goes on from, and how it stops for a signal without losing a step."""

from __future__ import annotations

import signal
from pathlib import Path

from opsd.build import Parts
from opsd.run import checkpoint
from opsd.run.folder import RunFolder
from opsd.utils import signals
from opsd.utils.errors import UserError


def find_checkpoint(run: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, None where none was saved yet; and what to tell about it, a line each.

    Raises UserError where all that were saved are lost.
    """
    newest, notes = checkpoint.newest(run.checkpoints)
    every, reached = run.config.checkpoint.every, run.last_step()
    if newest is None and (checkpoint.damaged(run.checkpoints) or 0 < every < reached):
        raise UserError(
            f"--resume {run.path}: no whole checkpoint is left in {run.checkpoints}, the run's metrics reach step "
            f"{reached}{''.join(f'; {note}' for note in notes)}; put one back, or start anew with another --out"
        )
    if newest is None:
        return None, ["no checkpoint was saved yet: starts from the first step"]
    return newest, [*notes, f"goes on from {newest}"]


def save_if_due(parts: Parts, run: RunFolder, step: int, metrics: dict[str, float]) -> None:
    """A checkpoint, where one is due. It comes before the step's evaluation, which may be long."""
    every, last = run.config.checkpoint.every, step == run.config.steps
    if last or (every and step % every == 0):
        _save(parts, run, step, metrics)


def _save(parts: Parts, run: RunFolder, step: int, metrics: dict[str, float]) -> None:
    """A checkpoint of the weights as they are, after `step`; a call of all ranks, which wait for its end."""
    tensors, values = parts.engine.optimizer_state()
    weights, adapters = parts.engine.weights(), parts.engine.adapters()
    if parts.ranks.is_main:
        selector = {} if parts.selector is None else parts.selector.state_dict()
        state = checkpoint.TrainerState(step, tensors, values, selector, metrics)
        model, keep = parts.engine.student.model, run.config.checkpoint.keep
        checkpoint.save(run.checkpoints, model, parts.tokenizer, state, keep, weights, adapters)
    parts.ranks.gather(None)


def stop_if_asked(parts: Parts, run: RunFolder, step: int, metrics: dict[str, float] | None = None) -> None:
    """Where a signal reached any rank: save what `step` made, unless that is done already, and raise Interrupted.

    metrics: the step's, where its line is not written yet.
    """
    ranks = parts.ranks
    number = max(ranks.gather(signals.asked()))
    if not number:
        return
    saved = f"{checkpoint.place(run.checkpoints, step)} is saved"
    if step == 0:
        saved = "nothing was trained yet"
    elif not ranks.broadcast(checkpoint.place(run.checkpoints, step).exists()):
        _save(parts, run, step, metrics or {})
    name = signal.Signals(number).name
    raise signals.Interrupted(
        number,
        f"stopped by {name} after step {step}, {saved}; go on with: opsd train --resume {run.path}",
        orderly=True,
    )
