"""On-policy distillation. One step is one pass through the loop of `Trainer.train`; its update is right below."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from opsd.build import Parts, assemble
from opsd.config import TrainConfig
from opsd.config.saved import check_resumable
from opsd.data.hub import pin
from opsd.data.packing import for_teacher, pack, share
from opsd.distill import DistillResult
from opsd.distill.loss import distill
from opsd.engine import check_engine, learning_rate, settled
from opsd.eval.cache import check_cache, evaluate_before
from opsd.eval.evaluator import summary, unread
from opsd.metrics import StepLog
from opsd.rollout.lengths import trainable
from opsd.run import checkpoint
from opsd.run.folder import Follower, RunFolder
from opsd.run.health import Health
from opsd.run.tracking import Stopwatch, Tracker, forget_peak
from opsd.types import Head, MicroBatch, Rollout, Sampling
from opsd.update import StepPlanner, Update, rollout_weights
from opsd.utils import signals
from opsd.utils.distributed import ONE_RANK, Ranks, join, local_device
from opsd.utils.errors import DAMAGED, RunStopped, StepUnusable, UserError, said
from opsd.utils.oom import memory_for
from opsd.utils.paths import check_new_run
from opsd.utils.seeding import derive_seed


def start(config: TrainConfig) -> None:
    """Train from the student's folder into a new run folder. Raises UserError before anything is written."""
    check_new_run(Path(config.out))
    check_cache(config)
    # Settle automatic settings now: config.json records the choice, and a resumed run uses the same.
    config = dataclasses.replace(config, engine=settled(config.engine, local_device(config.engine.device)))
    config = pinned(config)
    ranks = _join_ranks(config)
    parts = assemble(config, ranks)
    folder = RunFolder.create(config, parts.began) if ranks.is_main else Follower(Path(config.out), config)
    with folder.alone():
        Trainer(config, parts, folder).run(folder.notes)


def pinned(config: TrainConfig) -> TrainConfig:
    """The same with hub data sets fixed to their current commits: later changes there do not affect this run."""
    pairs = (pair.partition("=") for pair in config.eval.suite)
    suites = tuple(f"{name}={pin(place)}" if place else name for name, _, place in pairs)
    return dataclasses.replace(config, prompts=pin(config.prompts), eval=dataclasses.replace(config.eval, suite=suites))


def resume(path: Path, steps: int | None = None) -> None:
    """Continue from a run's newest intact checkpoint, with the numbers that the uninterrupted run would have had.

    steps: a later end than the run's own; its schedule is then stretched to it. Raises UserError if the run is finished
    or every saved checkpoint is lost: a run never silently starts over.
    """
    check_resumable(path, steps)
    folder = RunFolder.open(path)
    config = dataclasses.replace(folder.config, steps=steps or folder.config.steps)
    ranks = _join_ranks(config)
    with folder.alone() if ranks.is_main else nullcontext():
        _resume(path, folder, config, ranks, steps)


def _resume(path: Path, folder: RunFolder, config: TrainConfig, ranks: Ranks, steps: int | None) -> None:
    """See `resume`. config: the folder's, with the number of steps wanted now."""
    newest, notes = ranks.broadcast(_find_checkpoint(folder) if ranks.is_main else (None, []))
    state = None if newest is None else checkpoint.load_state(newest)
    parts = assemble(config, ranks, newest, folder.began)
    if state is not None:
        _restore(parts, state, newest)
    has_line = ranks.broadcast(folder.cut_after(None if state is None else state.step) if ranks.is_main else False)
    # If the run ended after a step's checkpoint but before its line of metrics, the line is still to be written.
    pending = None if state is None or has_line else {"step": state.step, **state.metrics}
    done_steps = 0 if state is None else state.step
    if steps is not None:
        notes = [*notes, extension(folder.config, config, done_steps)]
        if ranks.is_main:
            folder.extend(steps)
    folder = folder if ranks.is_main else Follower(path, config)
    Trainer(config, parts, folder, done_steps).run(notes, pending)


def extension(old: TrainConfig, new: TrainConfig, done_steps: int) -> str:
    """How extending the run changes the learning rate, in one line."""
    before, after = (learning_rate(done_steps + 1, config.steps, config.optim) for config in (old, new))
    said = f"extended from {old.steps} to {new.steps} steps"
    if before == after:
        return f"{said}; the learning rate is constant, so the result is as if the run had started with these"
    return (
        f"{said}; the schedule stretches: the learning rate of step {done_steps + 1} is {after:.2e} instead "
        f"of {before:.2e}, and a run started with {new.steps} steps would have used other rates so far"
    )


class Trainer:
    """A run: its settings, its parts, its folder, and the loop. done_steps: steps already trained."""

    # Shows the current stage; None until the run starts.
    tracker: Tracker | None = None

    def __init__(self, config: TrainConfig, parts: Parts, folder: RunFolder, done_steps: int = 0) -> None:
        self.config, self.parts, self.folder, self.done_steps = config, parts, folder, done_steps
        self.engine, self.ranks = parts.engine, parts.engine.ranks
        how = (config.loss, parts.vocab_size, parts.stops, config.select.stop_token)
        self.planner = StepPlanner(parts.engine, parts.teacher, parts.selector, *how)
        self.health = Health(config)
        self.log = StepLog(config, parts, folder)
        self.watch = Stopwatch(parts.engine.device)

    def train(self, tracker: Tracker) -> None:
        """The loop. If a signal asks it to stop, it saves the weights and stops between two stages."""
        config, parts, ranks, log = self.config, self.parts, self.ranks, self.log
        skipped = ranks.broadcast(self.folder.skipped_in_row())
        for step in range(self.done_steps + 1, config.steps + 1):
            self.watch = Stopwatch(self.engine.device)
            with self.stage("rollout"):
                prompts, seed = parts.prompts.take(step), derive_seed(config.seed, "rollout", step)
                sampling = Sampling.of(config.rollout, config.rollout.horizon_at(step))
                rollouts = parts.sampler.generate(prompts, config.rollout.samples_per_prompt, sampling, seed)
            self.stop_if_asked(step - 1)
            with self.stage("reward"):
                rewards = ranks.broadcast(parts.evaluator.rewards(rollouts) if ranks.is_main else None)
            with self.stage("teacher"):
                if parts.asking is not None:
                    rollouts = parts.asking.with_samples(rollouts, rewards, config.rollout.samples_per_prompt)
                trained = trainable(rollouts, config.rollout.truncated)
                batches = pack(trained, config.engine.micro_batch_tokens)
                micros = share(batches, ranks.rank, ranks.world_size)
                teacher = parts.teacher.hidden(for_teacher(micros, trained))
            with self.stage("log"):
                top = log.top_tokens(step, trained, micros, teacher)
            self.stop_if_asked(step - 1)
            update, weights, watched = None, rollout_weights(rollouts, rewards, config), log.statistics_due(step)
            with self.kept_if_unusable(step, rollouts, rewards, skipped), self.stage("student"):
                update = self.update(micros, teacher, step, watched, weights)
            skipped = 0 if update is not None else skipped + 1
            parts.teacher.end_step(step)
            # No longer needed, and gigabytes at scale.
            del teacher
            with self.stage("sync"):
                parts.sampler.sync()
            with self.stage("log"):
                metrics = log.of_step(step, rollouts, rewards, batches) | log.of_update(step, trained, update, top)
                metrics |= log.of_cut(rollouts, trained) | self.watch.metrics()
            self.save_if_due(step, metrics)
            self.stop_if_asked(step, metrics)
            self.record(step, metrics | self.evaluate_after(step, tracker), tracker)

    def update(
        self,
        micros: list[MicroBatch],
        teacher: list[Tensor],
        step: int,
        watched: frozenset[str] = frozenset(),
        weights: Tensor | None = None,
    ) -> Update:
        """One optimiser step on this rank's share of micro-batches, given the teacher's hidden states [N, E] of each.

        watched: statistics to compute over all tokens; they do not affect training. weights: the loss weight of each of
        the step's rollouts, by id; they never change the kept count. Raises StepUnusable, on every rank and with all
        state as before the step, if there is no token to train on, or if the teacher's states, the loss or its gradient
        are not finite; RunStopped if a selector keeps a different count than it announced.
        """
        lr, planner = learning_rate(step, self.config.steps, self.config.optim), self.planner
        spec = planner.loss_at(step)
        try:
            plan = planner.plan(micros, teacher, derive_seed(self.config.seed, "select", step), watched)
            results = []
            for micro, teacher_NE, choice in zip(micros, teacher, plan.choices, strict=True):

                def loss(student_ND: Tensor, head: Head, m=micro, t=teacher_NE, c=choice) -> DistillResult:
                    return distill(planner.inputs(student_ND, head, m, t, weights), c, spec)

                result = self.engine.forward(micro, loss)
                self.engine.backward(result.loss_sum, planner.denominator(plan, result))
                # Free the graph.
                results.append(dataclasses.replace(result, loss_sum=result.loss_sum.detach()))
            planner.check_results(plan, results)
            with self.stage("optimiser"):
                grad_norm = self.engine.step(lr)
            return planner.end_step(plan, micros, results, grad_norm)
        except StepUnusable:
            planner.forget_step()
            raise

    def run(self, notes: Sequence[str] = (), pending: dict[str, Any] | None = None) -> None:
        """Evaluate, train and finish. notes: printed first.

        pending: metrics of the last finished step, if their line is not written yet.
        """
        # Loading makes temporary copies, which must not count towards the peak memory of a step.
        forget_peak(self.engine.device)
        with Tracker(self.folder, self.done_steps) as tracker:
            self.tracker = tracker
            for note in [*notes, *self.parts.notes] if self.ranks.is_main else ():
                tracker.say(note)
            if self.parts.dropped_prompts and self.ranks.is_main:
                dropped = self.parts.dropped_prompts
                tracker.say(f"{dropped} prompts dropped, longer than --rollout.max_prompt_tokens")
            if self.done_steps == 0:
                self.evaluate_before(tracker)
            for line in self.folder.history() if self.done_steps else ():
                self.health.see(line)
            if pending is not None:
                self.record(self.done_steps, pending | self.evaluate_after(self.done_steps, tracker), tracker)
            with signals.heeded():
                self.train(tracker)
            self.folder.finish()
        tracker.finished()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of a step: its seconds are `time/NAME_s`; running out of memory in it stops the run with one line."""
        if self.tracker is not None:
            self.tracker.stage(name)
        with memory_for(name), self.watch.stage(name):
            yield

    @contextlib.contextmanager
    def kept_if_unusable(
        self, step: int, rollouts: list[Rollout], rewards: list[float] | None, skipped: int
    ) -> Iterator[None]:
        """If the step cannot be trained on, save its rollouts for inspection and stop the run.

        Under --optim.on_nonfinite skip, skip the step instead. skipped: how many steps right before it were skipped.
        """
        try:
            yield
        except RunStopped as problem:
            # Every rank has the step's rollouts and decides the same; rank 0 writes them.
            optim, folder = self.config.optim, self.folder
            skips = isinstance(problem, StepUnusable) and optim.on_nonfinite == "skip"
            leave_out = skips and skipped < optim.max_skipped_steps
            name = f"{'skipped' if leave_out else 'stopped'}_at_step_{step}"
            folder.write_rollouts(name, rollouts, self.parts.tokenizer, rewards)
            if leave_out:
                return
            many = f" ({skipped} steps before it were skipped, --optim.max_skipped_steps)" if skips else ""
            saved = f"the newest checkpoint in {folder.checkpoints} is intact"
            if not any(folder.checkpoints.glob("step_*")):
                saved = "no checkpoint was saved yet" + "; the same command starts it again" * (step == 1)
            where = folder.path / "rollouts" / f"{name}.jsonl"
            raise RunStopped(f"step {step}: {problem}{many}; its rollouts are in {where}, {saved}") from problem

    def evaluate_before(self, tracker: Tracker) -> None:
        """Evaluate the teacher and the untrained student; their results are the metrics of step 0."""
        if not self.parts.evaluator.suites:
            return
        metrics: dict[str, float] = {"step": 0}
        with self.stage("evaluation"):
            for name, result in evaluate_before(self.parts.models(), self.folder, tracker).items():
                self.say_unread(result, tracker)
                metrics |= summary(result, "teacher_eval" if name == "teacher" else "eval")
        tracker.step(metrics)

    def evaluate_after(self, step: int, tracker: Tracker) -> dict[str, float]:
        """The evaluation that is due after `step`, if any."""
        every, evaluator = self.config.eval.every, self.parts.evaluator
        if not evaluator.suites or (step != self.config.steps and (not every or step % every)):
            return {}
        tracker.doing("evaluating")
        with self.stage("evaluation"):
            result = evaluator.run(self.parts.sampler, self.config.student, step)
        self.say_unread(result, tracker)
        self.folder.write_eval(f"step_{step}", result)
        self.folder.write_card(step)
        return summary(result)

    def say_unread(self, result: dict[str, Any], tracker: Tracker) -> None:
        """Name suites in which the grader found no answer at all: the score of 0 may be the grader's fault."""
        for line in unread(result) if self.ranks.is_main else ():
            tracker.say(line)

    def record(self, step: int, metrics: dict[str, float], tracker: Tracker) -> None:
        """Write a step's line and print its health warnings; under --health stop, a warning also saves a checkpoint and
        raises RunStopped."""
        warnings = self.health.see(metrics) if self.ranks.is_main else []
        tracker.step(metrics | {f"health/{warning.name}": 1 for warning in warnings})
        for warning in warnings:
            tracker.say(f"step {step}: {warning.text}")
        stops = self.config.health == "stop" and step < self.config.steps
        if stops and self.ranks.broadcast(bool(warnings)):
            self.save_unless_there(step, metrics)
            saved = f"{checkpoint.place(self.folder.checkpoints, step)} is saved"
            resume = f"continue with: opsd train --resume {self.folder.path}"
            raise RunStopped(f"step {step}: stopped by --health stop, {saved}; {resume}")

    def save_if_due(self, step: int, metrics: dict[str, float]) -> None:
        """Save a checkpoint if one is due. It comes before the step's evaluation, which may be long."""
        every = self.config.checkpoint.every
        if step == self.config.steps or (every and step % every == 0):
            self.save(step, metrics)

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Save a checkpoint of the weights after `step`. All ranks must call it; they wait until it is written."""
        with self.stage("checkpoint"):
            optimizer = self.engine.optimizer_state()
            weights, adapters, teacher = self.engine.weights(), self.engine.adapters(), self.parts.teacher.state()
            if self.ranks.is_main:
                selector = {} if self.parts.selector is None else self.parts.selector.state_dict()
                state = checkpoint.TrainerState(step, optimizer, selector, metrics, teacher)
                model, keep = self.engine.student.model, self.config.checkpoint.keep
                folder, tokenizer = self.folder.checkpoints, self.parts.tokenizer
                checkpoint.save(folder, model, tokenizer, state, keep, weights, adapters, self.parts.source)
                self.folder.write_card(step)
            self.ranks.gather(None)

    def save_unless_there(self, step: int, metrics: dict[str, float]) -> None:
        """Save a checkpoint of `step` unless there is one. All ranks must call it."""
        if not self.ranks.broadcast(checkpoint.place(self.folder.checkpoints, step).exists()):
            self.save(step, metrics)

    def stop_if_asked(self, step: int, metrics: dict[str, float] | None = None) -> None:
        """If a signal reached any rank: save a checkpoint of `step` unless there is one, and raise Interrupted.

        metrics: the step's, if its line is not written yet.
        """
        number = max(self.ranks.gather(signals.asked()))
        if not number:
            return
        place = checkpoint.place(self.folder.checkpoints, step)
        saved = f"{place} is saved"
        if step == 0:
            saved = "nothing was trained yet"
        else:
            self.save_unless_there(step, metrics or {})
        name = signal.Signals(number).name
        raise signals.Interrupted(
            number,
            f"stopped by {name} after step {step}, {saved}; continue with: opsd train --resume {self.folder.path}",
            orderly=True,
        )


def _join_ranks(config: TrainConfig) -> Ranks:
    """Join the other training processes; the torch engine has a single rank."""
    check_engine(config)
    if config.engine.kind != "deepspeed":
        return ONE_RANK
    return join(local_device(config.engine.device), config.engine.wait_s)


def _find_checkpoint(folder: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint (None if none was saved yet), and notes to print about it, one line each.

    Raises UserError if all saved checkpoints are lost.
    """
    newest, notes = checkpoint.newest(folder.checkpoints)
    every, reached = folder.config.checkpoint.every, folder.last_step()
    if newest is None and (checkpoint.damaged(folder.checkpoints) or 0 < every < reached):
        raise UserError(
            f"--resume {folder.path}: no intact checkpoint is left in {folder.checkpoints}, the run's metrics reach "
            f"step {reached}{''.join(f'; {note}' for note in notes)}; put one back, or start again with another --out"
        )
    if newest is None:
        return None, ["no checkpoint was saved yet: starts from the first step"]
    return newest, [*notes, f"continues from {newest}"]


def _restore(parts: Parts, state: checkpoint.TrainerState, newest: Path | None) -> None:
    """Restore optimiser, selector and teacher from a checkpoint. Raises UserError if it does not fit this run."""
    what = f"checkpoint {newest}: its trainer state does not fit this run"
    with said(what, "remove it to resume from the previous one", *DAMAGED):
        parts.teacher.load_state(state.teacher)
        parts.engine.load_optimizer_state(state.optimizer_tensors)
        if parts.selector is not None:
            parts.selector.load_state_dict(state.selector)
