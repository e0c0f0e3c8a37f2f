"""What selection does once per optimiser step of a TRL trainer: metrics, the token record, the selector's state.

Legend: N tokens that the student wrote in a step, over all ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opsd.distill.stats import join_ranks, stop_metrics
from opsd.run.disk import replace, writing
from opsd.run.folder import RunFolder
from opsd.run.token_record import token_table
from opsd.selection import REQUIRED_FIELDS, STOP_FIELDS, TokenStats, load_telemetry
from opsd.types import Prompt, Rollout
from opsd.utils.distributed import Ranks
from opsd.utils.errors import RunStopped, UserError
from tip_patch.adapters.trl_loss import ROLLOUT

# Key of the selector's state in a checkpoint's trainer_state.json.
STATE = "token_selection"


class StepEnd(TrainerCallback):
    """Closes each step of a selecting trainer. every: steps between telemetry, None: as often as TRL logs, 0: never.

    record: folder of the token record, written with the telemetry; None for none.
    """

    def __init__(self, trainer: Any, every: int | None, record: Path | None) -> None:
        self._trainer, self._every, self._record = trainer, every, record
        self._telemetry = load_telemetry()
        self._folder: RunFolder | None = None

    def statistics_due(self, step: int) -> frozenset[str]:
        """The statistics that this step needs for every token."""
        if not self._is_due(step):
            return frozenset()
        record = frozenset() if self._record is None else REQUIRED_FIELDS
        stops = STOP_FIELDS if self._trainer.tip.stops.ids else frozenset()
        return record.union(stops, *(telemetry.needs for telemetry in self._telemetry))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """In a resumed run: restore the selector from the checkpoint, and cut off the record after it."""
        selector, saved = self._trainer.tip.selector, _values(state)
        if selector is not None and state.global_step and STATE in saved:
            selector.load_state_dict(saved[STATE])
        if self._record is not None and self._trainer.accelerator.is_main_process:
            self._folder = self._open(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log metrics, update the selector. Raises RunStopped if it kept a different count than it announced."""
        tip, step = self._trainer.tip, state.global_step + 1
        ranks, device = self.ranks(), self._trainer.accelerator.device
        kept, tokens = self._count()
        if tip.selector is not None and tip.kept is not None and tip.kept != kept:
            raise RunStopped(f"the selector kept {kept} tokens, its budget() says {tip.kept}: set fixed_budget False")
        metrics = {"select/kept_frac": kept / max(tokens, 1)}
        if tip.selector is not None:
            tip.selector.end_step(lambda t: self._trainer.accelerator.reduce(t.to(device), "sum").cpu())
        if self._is_due(step):
            stats = join_ranks(tip.scored or [part.stats for part in tip.done], ranks)
            kept_N = ranks.concatenate(torch.cat([part.kept_N for part in tip.done]))
            rollouts = [] if self._record is None else [one for part in ranks.gather(self._rollouts()) for one in part]
            if ranks.is_main:
                metrics |= self._read(stats, kept_N)
                self._write(step, rollouts, stats, kept_N, metrics)
        for name, value in metrics.items():
            self._trainer._metrics["train"][name].append(value)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Store the selector's state for a checkpoint of this step."""
        selector = self._trainer.tip.selector
        if selector is not None:
            _values(state)[STATE] = selector.state_dict()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the record as finished if training reached its end."""
        if self._folder is not None and state.global_step >= state.max_steps:
            self._folder.finish()

    def _is_due(self, step: int) -> bool:
        every = self._trainer.state.logging_steps if self._every is None else self._every
        return bool(every) and step % every == 0

    def ranks(self) -> Ranks:
        """The trainer's processes."""
        return Ranks(self._trainer.accelerator.process_index, self._trainer.accelerator.num_processes)

    def _count(self) -> tuple[int, int]:
        """Kept tokens and tokens of the step. Raises UserError if TRL's loss function was never called."""
        done = self._trainer.tip.done
        if not done:
            raise UserError(f"{type(self._trainer).__name__} computes its own loss; give trl.DistillationTrainer")
        own = [sum(int(part.kept_N.sum()) for part in done), sum(part.kept_N.numel() for part in done)]
        counts = torch.tensor([own], device=self._trainer.accelerator.device)
        kept, tokens = self._trainer.accelerator.gather(counts).sum(0).tolist()
        return kept, tokens

    def _read(self, stats: TokenStats, kept_N: Tensor) -> dict[str, float]:
        """The metrics of the installed telemetry, and those of the stop tokens."""
        tip, found = self._trainer.tip, stop_metrics(stats, kept_N)
        for telemetry in self._telemetry:
            if all(getattr(stats, name) is not None for name in telemetry.needs):
                found |= telemetry(stats, kept_N, tip.selector, tip.seed)
        return found

    def _rollouts(self) -> list[Rollout]:
        """This rank's answers of the step."""
        trainer = self._trainer
        return [rollout for micro in trainer.tip.micros for rollout in rollouts_of(micro, trainer.eos_token_ids)]

    def _write(
        self, step: int, rollouts: list[Rollout], stats: TokenStats, kept_N: Tensor, metrics: dict[str, float]
    ) -> None:
        """Write the step's record, if one is asked for."""
        folder = self._folder
        if folder is None:
            return
        rollouts = sorted(rollouts, key=lambda rollout: rollout.id)
        most = folder.config.telemetry.max_rollouts_saved
        folder.write_tokens(step, token_table(step, rollouts, most, stats, kept_N, self._telemetry))
        folder.write_rollouts(f"step_{step}", rollouts, self._trainer._tokenizer, None)
        folder.write_metrics({"step": step, **metrics})

    def _open(self, state: TrainerState) -> RunFolder:
        """The record's folder, new or continued. Raises UserError if it holds something else."""
        path = self._record
        assert path is not None
        if state.global_step and (path / "config.json").is_file():
            folder = RunFolder.open(path)
            folder.cut_after(state.global_step)
            (path / "DONE").unlink(missing_ok=True)
            return folder
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"token_record {path} is not a new or empty folder; give another one")
        with writing(f"token_record {path}", "give another folder", UserError):
            path.mkdir(parents=True, exist_ok=True)
            replace(path / "config.json", json.dumps(self._settings(path, state), indent=2) + "\n")
        folder = RunFolder.open(path)
        self._trainer._tokenizer.save_pretrained(folder.config.student)
        self._trainer.accelerator.unwrap_model(self._trainer.model).config.save_pretrained(folder.config.student)
        return folder

    def _settings(self, path: Path, state: TrainerState) -> dict[str, Any]:
        """What `opsd inspect` and the report read; TRL's other settings have no counterpart in `opsd train`.

        The student is the record's tokenizer folder.
        """
        trainer, args, selector = self._trainer, self._trainer.args, self._trainer.tip.selector
        student, teacher = (_name(model) for model in (trainer.model, trainer.teacher_model))
        name = "all" if selector is None else getattr(selector, "name", type(selector).__name__)
        longest = {} if args.max_completion_length is None else {"max_new_tokens": args.max_completion_length}
        answers = args.per_device_train_batch_size * args.gradient_accumulation_steps
        spec = trainer._spec()
        return {
            "student": str(path / student),
            "teacher": {"model": teacher},
            "prompts": "",
            "out": str(path),
            "steps": max(state.max_steps, 1),
            "prompts_per_step": answers * trainer.accelerator.num_processes,
            "seed": trainer.tip.first_seed,
            "rollout": {"samples_per_prompt": 1, "temperature": args.temperature, **longest},
            "select": {"by": name, "retention": getattr(selector, "retention", 1.0)},
            "loss": {"divergence": spec.divergence, "beta": spec.beta, "temperature": spec.temperature},
            "optim": {"lr": args.learning_rate},
        }


def rollouts_of(micro: dict[str, Any], eos_ids: list[int]) -> list[Rollout]:
    """The answers of one of TRL's micro-batches, without padding."""
    found = []
    for place, number in enumerate(micro[ROLLOUT].tolist()):
        written = micro["completion_mask"][place].bool()
        prompt_ids = micro["prompt_ids"][place][micro["prompt_mask"][place].bool()].tolist()
        ids = micro["completion_ids"][place][written].tolist()
        mask = micro["tool_mask"][place][written].bool().tolist() if "tool_mask" in micro else None
        prompt = Prompt(str(number), "", prompt_ids, None)
        found.append(Rollout(number, prompt, ids, not ids or ids[-1] not in eos_ids, mask))
    return found


def _values(state: TrainerState) -> dict[str, Any]:
    """What callbacks keep in a checkpoint, by name."""
    values: Any = state.stateful_callbacks
    return values


def _name(model: Any) -> str:
    """A model's folder name, or its name on the hub."""
    return Path(getattr(model.config, "_name_or_path", "") or "model").name
