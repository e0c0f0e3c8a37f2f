"""What a step logs and records: its metrics, its rollouts, its tokens.

Legend: N student tokens of a micro-batch.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from opsd.build import Parts
from opsd.config import TrainConfig
from opsd.distill.inputs import LossSpec, check_inputs
from opsd.distill.stats import stop_metrics
from opsd.distill.topk import ModelTop, top_tokens
from opsd.engine import learning_rate
from opsd.rollout.lengths import length_metrics
from opsd.run.folder import RunFolder
from opsd.run.token_record import recorded_rollouts, token_table
from opsd.run.tracking import peak_gib
from opsd.selection import REQUIRED_FIELDS, STATISTICS, STOP_FIELDS, TokenTelemetry
from opsd.types import Head, MicroBatch, Rollout
from opsd.update import Update
from opsd.utils.distributed import Ranks
from opsd.utils.seeding import derive_seed

# Statistics whose means are logged, and the names of those metrics.
MEANS = {name: of.metric for name, of in STATISTICS.items() if of.metric is not None}


class StepLog:
    """Measures each step of a run, and writes its files when they are due."""

    def __init__(self, config: TrainConfig, parts: Parts, folder: RunFolder) -> None:
        self._config, self._parts, self._folder = config, parts, folder

    def statistics_due(self, step: int) -> frozenset[str]:
        """The statistics that this step's telemetry reads, over all tokens."""
        due = self._due(step)
        if not due:
            return frozenset()
        record = REQUIRED_FIELDS if self._config.telemetry.save_tokens else frozenset()
        stops = STOP_FIELDS if self._parts.stops.ids else frozenset()
        return frozenset(MEANS).union(record, stops, *(telemetry.needs for telemetry in due))

    @torch.no_grad()
    def top_tokens(
        self, step: int, rollouts: list[Rollout], micros: list[MicroBatch], teacher: list[Tensor]
    ) -> tuple[ModelTop, ModelTop] | None:
        """Both models' likeliest tokens for the token record, taken before the update; None if not due.

        At the rows of the recorded rollouts, in the order of the micro-batches. One forward pass of the student over
        every micro-batch, whether or not it holds such a row: under sharding all ranks must make the same calls.
        """
        parts, wanted, loss = self._parts, self._config.telemetry, self._config.loss
        if not (wanted.top_tokens and micros and self._due(step)):
            return None
        recorded = torch.tensor(recorded_rollouts(rollouts, wanted.max_rollouts_saved), dtype=torch.int64)
        spec = LossSpec(temperature=loss.temperature, chunk_tokens=loss.chunk_tokens)
        found = []
        for micro, teacher_NE in zip(micros, teacher, strict=True):

            def use(student_ND: Tensor, head: Head, micro=micro, teacher_NE=teacher_NE) -> tuple[ModelTop, ModelTop]:
                row_R = torch.isin(micro.rollout_N, recorded).nonzero().squeeze(1).to(student_ND.device)
                inputs = check_inputs(
                    student_ND[row_R],
                    head,
                    teacher_NE.to(student_ND.device)[row_R],
                    parts.teacher.head_for(micro),
                    vocab_size=parts.vocab_size,
                    token_ids_N=micro.token_ids_N.to(student_ND.device)[row_R],
                )
                return top_tokens(inputs, wanted.top_tokens, spec)

            found.append(parts.engine.forward(micro, use))
        student, teacher_top = zip(*found, strict=True)
        return _join(student, parts.ranks), _join(teacher_top, parts.ranks)

    def of_step(
        self, step: int, rollouts: list[Rollout], rewards: list[float] | None, batches: list[MicroBatch]
    ) -> dict[str, float]:
        """Metrics of the step's rollouts and micro-batches (of all ranks); writes its file of rollouts if due."""
        config, packed = self._config, sum(micro.input_ids_1L.numel() for micro in batches)
        metrics: dict[str, float] = {
            "step": step,
            "mem/peak_gib": max(self._parts.ranks.gather(peak_gib(self._parts.engine.device))),
            "optim/lr": learning_rate(step, config.steps, config.optim),
            "rollout/tokens": sum(rollout.student_tokens() for rollout in rollouts),
            "rollout/truncated_frac": sum(rollout.truncated for rollout in rollouts) / len(rollouts),
            "batch/micro_batches": len(batches),
        }
        if batches:
            metrics["batch/fill_frac"] = packed / (len(batches) * config.engine.micro_batch_tokens)
        if config.rollout.horizon < 1.0:
            metrics["rollout/horizon_tokens"] = config.rollout.horizon_at(step)
        if self._parts.asking is not None:
            own = sum(rollout.prompt.teacher_ids is not None for rollout in rollouts)
            metrics["teacher/context_frac"] = own / len(rollouts)
        metrics |= length_metrics(rollouts, rewards)
        if rewards is not None:
            metrics["rollout/reward"] = sum(rewards) / len(rewards)
        every, recorded = config.telemetry.save_rollouts_every, config.telemetry.save_tokens and self._due(step)
        # The viewer shows a token record together with its prompts.
        if every and (step % every == 0 or step in {1, config.steps} or recorded):
            self._folder.write_rollouts(f"step_{step}", rollouts, self._parts.tokenizer, rewards)
        return metrics

    def of_update(
        self, step: int, rollouts: list[Rollout], update: Update | None, top: tuple[ModelTop, ModelTop] | None
    ) -> dict[str, float]:
        """Metrics of the step's update (None: the step was skipped); writes the token record if due."""
        if update is None:
            return {"optim/skipped": 1}
        metrics = {
            "optim/skipped": 0,
            "loss/nats": update.loss_nats,
            "loss/chunk_halvings": update.chunk_halvings,
            "select/kept_frac": update.kept / update.tokens,
            "optim/grad_norm": update.grad_norm,
        }
        for name, (nats, kept) in update.teachers.items():
            metrics |= {f"teacher/{name}/loss_nats": nats, f"teacher/{name}/kept": kept}
        if not self._parts.ranks.is_main:
            return metrics
        selector, due = self._parts.selector, self._due(step)
        partly = frozenset() if selector is None else selector.needs_kept - selector.needs
        for field, name in MEANS.items():
            values_N = getattr(update.stats, field)
            if values_N is not None and (due or field not in partly):
                metrics[name] = float(values_N.mean())
        if due:
            metrics |= stop_metrics(update.stats, update.kept_N)
        seed = derive_seed(self._config.seed, "select", step)
        for telemetry in due:
            metrics |= telemetry(update.stats, update.kept_N, selector, seed)
        if due and self._config.telemetry.save_tokens:
            most = self._config.telemetry.max_rollouts_saved
            table = token_table(step, rollouts, most, update.stats, update.kept_N, due, top)
            self._folder.write_tokens(step, table)
        return metrics

    def of_cut(self, rollouts: list[Rollout], trained: list[Rollout]) -> dict[str, float]:
        """How many rollouts and tokens are left out because they were cut off; none under --rollout.truncated keep."""
        if self._config.rollout.truncated == "keep":
            return {}
        tokens = sum(rollout.student_tokens() for rollout in rollouts)
        return {
            "rollout/left_out": len(rollouts) - len(trained),
            "rollout/left_out_tokens": tokens - sum(rollout.student_tokens() for rollout in trained),
        }

    def _due(self, step: int) -> list[TokenTelemetry]:
        """All installed telemetry if due in this step, else none. In a run of fewer steps, its last step is due."""
        every = min(self._config.telemetry.every, self._config.steps)
        return self._parts.telemetry if every and step % every == 0 else []


def _join(parts: tuple[ModelTop, ...], ranks: Ranks) -> ModelTop:
    """All micro-batches' rows of all ranks, in the order in which `Update` holds their statistics."""
    names = [field.name for field in dataclasses.fields(ModelTop)]
    return ModelTop(*(ranks.concatenate(torch.cat([getattr(part, name) for part in parts])) for name in names))
