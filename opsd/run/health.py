"""Watches a run's metrics and reports each problem once: what goes wrong, the likely reason, and which flag helps.

A bound compares the last steps with the run's best before, so that a slow decline is noticed too. The state comes only
from the lines of metrics.jsonl: a resumed run is fed those. docs/stops.md gives the reasons for the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from opsd.config import TrainConfig

# Number of steps whose mean is compared; of a metric that is logged less often, the last two values.
WINDOW, REWARD_WINDOW = 5, 10
# Fractions of rollouts that are truncated: the rise above the best, and the absolute bound.
TRUNCATED_RISE, TRUNCATED = 0.25, 0.5
# Growth of lengths, as a multiple of the shortest within LENGTH_STEPS: slower growth may come from the teacher.
LENGTH_GROWTH, LENGTH_STEPS = 1.5, 40
# Rise of the fraction of tokens inside repeated n-grams, above the lowest.
REPETITION_RISE = 0.2
# Fractions of the highest value before: of the student's probability of its end token, and of its entropy.
STOP_FALL, ENTROPY_FALL = 0.5, 0.25
# Teacher's minus student's log-probability of the student's end tokens, in nats.
STOP_DELTA_NATS = -5.0
# Fall of the reward, absolute and in standard errors (over prompts) of the difference of two windows.
REWARD_FALL, STANDARD_ERRORS = 0.15, 4.0


@dataclass(frozen=True)
class Finding:
    """A problem. name: its metric is health/NAME. text: one line for the user."""

    name: str
    text: str


class Recent(NamedTuple):
    """The mean of a metric's last values, and the lowest and highest mean of as many consecutive values before them."""

    now: float
    least: float
    largest: float


class Health:
    """Takes every step's metrics in order. If --health is off, it reports nothing."""

    def __init__(self, config: TrainConfig) -> None:
        self._on, self._told = config.health != "off", set[str]()
        self._series: dict[str, list[tuple[int, float]]] = {}
        # A smaller fall of the reward may be chance. Worst case: all rollouts of a prompt have the same reward.
        chance = STANDARD_ERRORS * 0.5 * (2 / (config.prompts_per_step * REWARD_WINDOW)) ** 0.5
        self._reward_fall = max(REWARD_FALL, chance)

    def see(self, metrics: dict[str, float]) -> list[Finding]:
        """The problems that this step's metrics show for the first time."""
        if not self._on:
            return []
        for name, value in metrics.items():
            self._series.setdefault(name, []).append((int(metrics["step"]), value))
        checks: tuple[Callable[[], str | None], ...] = (
            self._truncation, self._length, self._stop, self._repetition, self._entropy, self._reward
        )  # fmt: skip
        new = [Finding(name, text) for check in checks for name, text in self._found(check)]
        self._told |= {finding.name for finding in new}
        return new

    def _found(self, check: Callable[[], str | None]) -> Iterator[tuple[str, str]]:
        """The check's name and text, if it finds a problem that was not reported before."""
        name = check.__name__.removeprefix("_")
        if name not in self._told and (text := check()) is not None:
            yield name, f"health: {text}"

    def _recent(self, name: str, window: int = WINDOW, steps: int | None = None) -> Recent | None:
        """A metric's last values and those before, within the last `steps`; None if there are too few yet."""
        series = self._series.get(name, [])
        if not series:
            return None
        last = series[-1][0]
        count = max(2, sum(step > last - window for step, _ in series))
        values = np.array([value for step, value in series if steps is None or step > last - steps])
        if len(values) < 2 * count:
            return None
        means = np.convolve(values, np.full(count, 1 / count), "valid")
        before = means[: len(means) - count]
        return Recent(float(means[-1]), float(before.min()), float(before.max())) if len(before) else None

    def _truncation(self) -> str | None:
        series = [value for _, value in self._series.get("rollout/truncated_frac", [])][-WINDOW:]
        if len(series) < WINDOW:
            return None
        recent, now = self._recent("rollout/truncated_frac"), float(np.mean(series))
        if now < TRUNCATED and (recent is None or now < recent.least + TRUNCATED_RISE):
            return None
        before = "" if recent is None else f" ({recent.least:.0%} at best before)"
        return (
            f"{now:.0%} of the rollouts are truncated at --rollout.max_new_tokens{before}: answers do not end, or need "
            "more tokens; check the line about stops at the start (--rollout.stop_tokens), raise the limit, or "
            "give --rollout.truncated mask_tail"
        )

    def _length(self) -> str | None:
        recent = self._recent("length/mean_tokens", steps=LENGTH_STEPS)
        if recent is None or recent.now < LENGTH_GROWTH * recent.least:
            return None
        return (
            f"rollouts have grown from {recent.least:.0f} to {recent.now:.0f} tokens within {LENGTH_STEPS} steps: the "
            "student forgets when to stop, or the teacher writes longer answers; give --select.stop_token always, or a "
            "smaller --optim.lr"
        )

    def _stop(self) -> str | None:
        deltas = [value for _, value in self._series.get("stop/delta_nats", [])][-2:]
        recent = self._recent("stop/student_prob")
        if len(deltas) == 2 and max(deltas) <= STOP_DELTA_NATS:
            return (
                f"where the student ends, the teacher's probability of the end token is e^{deltas[-1]:.0f} times the "
                "student's: the stop will be trained away; the two end with different tokens, see the line about "
                "stops at the start (--rollout.stop_tokens), or student and teacher disagree on where to end"
            )
        if recent is None or recent.now > STOP_FALL * recent.largest:
            return None
        return (
            f"the student's probability of ending, where it ends, has fallen from {recent.largest:.2f} to "
            f"{recent.now:.2f}: the stop is being trained away; give --select.stop_token always, or see "
            "--rollout.stop_tokens"
        )

    def _repetition(self) -> str | None:
        recent = self._recent("repetition/ngram_frac")
        if recent is None or recent.now < recent.least + REPETITION_RISE:
            return None
        return (
            f"{recent.now:.0%} of the tokens repeat earlier text ({recent.least:.0%} at best before): "
            "rollouts loop; give --rollout.truncated mask_tail, or a smaller --optim.lr"
        )

    def _entropy(self) -> str | None:
        recent = self._recent("student/entropy_nats")
        if recent is None or recent.now > ENTROPY_FALL * recent.largest:
            return None
        return (
            f"the student's entropy has collapsed from {recent.largest:.2g} to {recent.now:.2g} nats per token: it "
            "always writes the same answer; give --loss.divergence forward_kl or jsd, or a smaller --optim.lr"
        )

    def _reward(self) -> str | None:
        reward, loss = self._recent("rollout/reward", REWARD_WINDOW), self._recent("loss/nats", REWARD_WINDOW)
        if reward is None or reward.now > reward.largest - self._reward_fall:
            return None
        beside = "" if loss is None else f" while the loss is at {loss.now:.2g} nats ({loss.least:.2g} at best before)"
        return (
            f"the reward has fallen from {reward.largest:.2f} to {reward.now:.2f}{beside}: lowering the loss "
            "no longer helps; look at rollouts/, give a smaller --optim.lr, or continue from an earlier checkpoint"
        )
