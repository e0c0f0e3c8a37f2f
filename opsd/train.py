"""On-policy distillation. One step is one pass through the loop of `_train`, a line a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from opsd.build import Parts, assemble
from opsd.config import TrainConfig
from opsd.config.paths import check_new_run
from opsd.data.packing import pack, share
from opsd.distill.topk import ModelTop
from opsd.engine import check_engine, learning_rate
from opsd.eval.cache import check_cache, evaluate_before
from opsd.eval.evaluator import summary
from opsd.rewards import reward_weights
from opsd.run import checkpoint
from opsd.run.folder import Follower, RunFolder
from opsd.run.token_record import RECORD_FIELDS, recorded_rollouts, score_top, token_table
from opsd.run.tracking import Stopwatch, Tracker, forget_peak, peak_gib
from opsd.saving import find_checkpoint, save_if_due, stop_if_asked
from opsd.selection import TokenTelemetry
from opsd.types import MicroBatch, Rollout
from opsd.update import Update
from opsd.utils import signals
from opsd.utils.distributed import ONE_RANK, Ranks, join, local_device
from opsd.utils.errors import RunStopped, StepUnusable, UserError
from opsd.utils.oom import memory_for
from opsd.utils.seeding import derive_seed

# Asked for at every telemetry step; the means of these are the run's diagnostics.
TOKEN_MEANS = {
    "entropy_N": "student/entropy_nats",
    "reverse_kl_N": "student/reverse_kl_nats",
    "teacher_entropy_N": "teacher/entropy_nats",
}


def start(config: TrainConfig) -> None:
    """Train from the student's folder into a new run folder. Raises UserError before anything is written."""
    check_new_run(Path(config.out))
    check_cache(config)
    ranks = _meet(config)
    parts = assemble(config, ranks)
    out, began = Path(config.out), parts.began
    _run(parts, RunFolder.create(config, began) if ranks.is_main else Follower(out, config), done_steps=0)


def resume(path: Path) -> None:
    """Go on from a run's newest whole checkpoint, to the numbers that the uninterrupted run would have had.

    Raises UserError where every checkpoint is lost: a run never starts again unasked.
    """
    run = RunFolder.open(path)
    if run.done:
        raise UserError(f"--resume {path}: this run has finished; start a new one to train on")
    ranks = _meet(run.config)
    newest, notes = ranks.broadcast(find_checkpoint(run) if ranks.is_main else (None, []))
    state = None if newest is None else checkpoint.load_state(newest)
    parts = assemble(run.config, ranks, newest, run.began)
    if state is not None:
        try:
            parts.engine.load_optimizer_state(state.optimizer_tensors, state.optimizer_values)
            if parts.selector is not None:
                parts.selector.load_state_dict(state.selector)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"checkpoint {newest}: its trainer state does not fit this run ({error!r}); "
                "remove it to resume from the one before"
            ) from error
    written = ranks.broadcast(run.cut_after(None if state is None else state.step) if ranks.is_main else False)
    if not ranks.is_main:
        run = Follower(path, run.config)
    # Where the run ended between a step's checkpoint and its line of metrics, the line is still to come.
    pending = None if state is None or written else {"step": state.step, **state.metrics}
    _run(parts, run, 0 if state is None else state.step, notes, pending)


def _meet(config: TrainConfig) -> Ranks:
    """This process among those that train; alone under the torch engine."""
    check_engine(config)
    if config.engine.kind != "deepspeed":
        return ONE_RANK
    return join(local_device(config.engine.device), config.engine.wait_s)


def _run(
    parts: Parts, run: RunFolder, done_steps: int, notes: Sequence[str] = (), pending: dict[str, Any] | None = None
) -> None:
    """Steps done_steps + 1 to the last. notes: told first. pending: metrics of step done_steps that lack a line yet."""
    # Loading takes copies of its own, which no step needs.
    forget_peak(parts.engine.device)
    with Tracker(run, done_steps) as tracker:
        for note in notes if parts.ranks.is_main else ():
            tracker.say(note)
        if parts.dropped_prompts and parts.ranks.is_main:
            tracker.say(f"prompts left out, longer than --rollout.max_prompt_tokens: {parts.dropped_prompts}")
        if done_steps == 0:
            with memory_for("evaluation"):
                _evaluate_before(parts, run, tracker)
        if pending is not None:
            with memory_for("evaluation"):
                tracker.step(pending | _evaluate_after(parts, run, done_steps, tracker))
        with signals.heeded():
            _train(parts, run, tracker, done_steps)
        run.finish()


def _train(parts: Parts, run: RunFolder, tracker: Tracker, done_steps: int) -> None:
    """The loop. Where a signal has asked for it, the weights are saved and the run stops, between two lines of it."""
    config, engine, ranks = run.config, parts.engine, parts.ranks
    skipped = ranks.broadcast(run.skipped_in_row())
    for step in range(done_steps + 1, config.steps + 1):
        watch = Stopwatch(engine.device)
        with watch.stage("step"):
            with watch.stage("rollout"), memory_for("rollout"):
                rollouts = _generate(parts, config, step)
            stop_if_asked(parts, run, step - 1)
            with watch.stage("teacher"), memory_for("teacher"):
                batches = pack(rollouts, config.engine.micro_batch_tokens)
                own = share(batches, ranks.rank, ranks.world_size)
                hidden = parts.teacher.hidden(own)
            with watch.stage("log"):
                top = _top_tokens(parts, config, step, rollouts, own, hidden)
            with watch.stage("reward"):
                rewards = ranks.broadcast(parts.evaluator.rewards(rollouts) if ranks.is_main else None)
            stop_if_asked(parts, run, step - 1)
            with watch.stage("student"):
                update = _update(parts, run, step, skipped, rollouts, rewards, own, hidden)
                skipped = 0 if update is not None else skipped + 1
            # Not needed until the next ones are there; at scale they are gigabytes.
            del hidden
            with watch.stage("sync"):
                parts.rollout.sync()
            with watch.stage("log"):
                metrics: dict[str, float] = {"step": step, "mem/peak_gib": max(ranks.gather(peak_gib(engine.device)))}
                if ranks.is_main:
                    metrics |= _measure(parts, run, step, rollouts, rewards, batches, update, top)
        metrics |= {f"time/{name}_s": seconds for name, seconds in watch.seconds.items()}
        with memory_for("checkpoint"):
            save_if_due(parts, run, step, metrics)
            stop_if_asked(parts, run, step, metrics)
        with memory_for("evaluation"):
            metrics |= _evaluate_after(parts, run, step, tracker)
        tracker.step(metrics)


def _generate(parts: Parts, config: TrainConfig, step: int) -> list[Rollout]:
    """The step's rollouts, by the student as it is now."""
    seed = derive_seed(config.seed, "rollout", step)
    return parts.rollout.generate(parts.stream.take(step), config.rollout.samples_per_prompt, parts.sampling, seed)


def _update(
    parts: Parts,
    run: RunFolder,
    step: int,
    skipped: int,
    rollouts: list[Rollout],
    rewards: list[float] | None,
    batches: list[MicroBatch],
    hidden: list[Any],
) -> Update | None:
    """Train on the step's rollouts; where that cannot be, keep them for a look, and stop.

    None where the step is left out instead, as --optim.on_nonfinite says. skipped: how many in front of it were.
    """
    config = run.config
    lr, seed = learning_rate(step, config.steps, config.optim), derive_seed(config.seed, "select", step)
    watch = frozenset().union(*(telemetry.needs for telemetry in _due(parts, config, step)))
    if watch:
        watch |= frozenset(TOKEN_MEANS) | (RECORD_FIELDS if config.telemetry.save_tokens else frozenset())
    weights = None
    if config.loss.reward_beta and rewards is not None:
        prompts = [rollout.id // config.rollout.samples_per_prompt for rollout in rollouts]
        weights = reward_weights(rewards, prompts, config.loss.reward_beta)
    try:
        return parts.updater.run(batches, hidden, lr, seed, watch, weights)
    except RunStopped as problem:
        # Every rank has the step's rollouts and decides alike; the first one writes.
        optim, unusable = config.optim, isinstance(problem, StepUnusable)
        skips = unusable and optim.on_nonfinite == "skip"
        leave_out = skips and skipped < optim.max_skipped_steps
        name = f"{'skipped' if leave_out else 'stopped'}_at_step_{step}"
        run.write_rollouts(name, rollouts, parts.tokenizer, rewards)
        if leave_out:
            return None
        many = f" ({skipped} steps before it were skipped, --optim.max_skipped_steps)" if skips else ""
        raise RunStopped(
            f"step {step}: {problem}{many}; its rollouts are in {run.path / 'rollouts' / name}.jsonl, "
            f"the weights of the newest checkpoint in {run.checkpoints} are sound"
        ) from problem


def _due(parts: Parts, config: TrainConfig, step: int) -> list[TokenTelemetry]:
    """The telemetry of this step: all or nothing."""
    return parts.telemetry if config.telemetry.every and step % config.telemetry.every == 0 else []


def _top_tokens(
    parts: Parts,
    config: TrainConfig,
    step: int,
    rollouts: list[Rollout],
    batches: list[MicroBatch],
    hidden: list[Tensor],
) -> tuple[ModelTop, ModelTop] | None:
    """Both models' likeliest tokens for the token record, before the update changes one of them; None if not due."""
    wanted = config.telemetry
    if not (wanted.top_tokens and batches and _due(parts, config, step)):
        return None
    recorded = recorded_rollouts(rollouts, wanted.max_rollouts_saved)
    common = (config.loss, parts.vocab_size)
    return score_top(parts.engine, parts.teacher, batches, hidden, recorded, wanted.top_tokens, *common)


def _measure(
    parts: Parts,
    run: RunFolder,
    step: int,
    rollouts: list[Rollout],
    rewards: list[float] | None,
    batches: list[MicroBatch],
    update: Update | None,
    top: tuple[ModelTop, ModelTop] | None,
) -> dict[str, float]:
    """What the step's rollouts and update (None: it was skipped) say, and its files where they are due."""
    config = run.config
    packed = sum(micro.input_ids_1L.numel() for micro in batches)
    metrics: dict[str, float] = {
        "optim/skipped": int(update is None),
        "optim/lr": learning_rate(step, config.steps, config.optim),
        "rollout/tokens": sum(rollout.student_tokens() for rollout in rollouts),
        "rollout/truncated_frac": sum(rollout.truncated for rollout in rollouts) / len(rollouts),
        "batch/micro_batches": len(batches),
    }
    if batches:
        metrics["batch/fill_frac"] = packed / (len(batches) * config.engine.micro_batch_tokens)
    if rewards is not None:
        metrics["rollout/reward"] = sum(rewards) / len(rewards)
    every = config.telemetry.save_rollouts_every
    if every and step % every == 0:
        run.write_rollouts(f"step_{step}", rollouts, parts.tokenizer, rewards)
    return metrics if update is None else metrics | _measure_update(parts, run, step, rollouts, update, top)


def _measure_update(
    parts: Parts,
    run: RunFolder,
    step: int,
    rollouts: list[Rollout],
    update: Update,
    top: tuple[ModelTop, ModelTop] | None,
) -> dict[str, float]:
    """What the step's update says, and the token record where it is due."""
    config = run.config
    metrics: dict[str, float] = {
        "loss/nats": update.loss_nats,
        "loss/chunk_halvings": update.chunk_halvings,
        "select/kept_frac": update.kept / update.tokens,
        "optim/grad_norm": update.grad_norm,
    }
    partly = frozenset() if parts.selector is None else parts.selector.needs_kept - parts.selector.needs
    due = _due(parts, config, step)
    for field, name in TOKEN_MEANS.items():
        values_N = getattr(update.stats, field)
        if values_N is not None and (due or field not in partly):
            metrics[name] = float(values_N.mean())
    seed = derive_seed(config.seed, "select", step)
    for telemetry in due:
        metrics |= telemetry(update.stats, update.kept_N, parts.selector, seed)
    if due and config.telemetry.save_tokens:
        labels = {}
        for label_tokens in (getattr(telemetry, "label_tokens", None) for telemetry in due):
            labels |= {} if label_tokens is None else label_tokens(update.stats)
        recorded = recorded_rollouts(rollouts, config.telemetry.max_rollouts_saved)
        run.write_tokens(step, token_table(step, rollouts, recorded, update.stats, update.kept_N, labels, top))
    return metrics


def _evaluate_before(parts: Parts, run: RunFolder, tracker: Tracker) -> None:
    """The teacher and the student as they start; the metrics of step 0."""
    if not parts.evaluator.suites:
        return
    metrics: dict[str, float] = {"step": 0}
    for name, result in evaluate_before(parts, run, tracker).items():
        metrics |= summary(result, "teacher_eval" if name == "teacher" else "eval")
    tracker.step(metrics)


def _evaluate_after(parts: Parts, run: RunFolder, step: int, tracker: Tracker) -> dict[str, float]:
    """The evaluation that is due after `step`, if any."""
    every, last = run.config.eval.every, step == run.config.steps
    if parts.evaluator.suites and (last or (every and step % every == 0)):
        return _evaluate(parts, run, step, tracker)
    return {}


def _evaluate(parts: Parts, run: RunFolder, step: int, tracker: Tracker) -> dict[str, float]:
    tracker.doing("evaluating")
    result = parts.evaluator.run(parts.rollout, run.config.student, step)
    run.write_eval(f"step_{step}", result)
    return summary(result)
