"""Statistics written by hand or drawn at random, and the paper's rules once more in plain numpy loops."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from opsd.selection import TokenStats

MakeStats = Callable[..., TokenStats]


@pytest.fixture(scope="session")
def make_stats() -> MakeStats:
    """TokenStats from lists or arrays; `rollout` defaults to one rollout, `mass` to ones and `ratio` to zeros
    beside a δ, others to None."""

    def make(
        rollout=None,
        h=None,
        delta=None,
        forward=None,
        teacher=None,
        grad=None,
        rank=None,
        vocab=None,
        ids=None,
        mass=None,
        ratio=None,
    ) -> TokenStats:
        named = (h, delta, forward, teacher, rank, ratio, ids, rollout)
        first = next(values for values in named if values is not None)
        rollout = [0] * len(first) if rollout is None else rollout
        if delta is not None:
            mass = [1.0] * len(delta) if mass is None else mass
            ratio = [0.0] * len(delta) if ratio is None else ratio

        def floats(values):
            return None if values is None else torch.as_tensor(values, dtype=torch.float32)

        return TokenStats(
            rollout_N=torch.as_tensor(rollout, dtype=torch.int64),
            entropy_N=floats(h),
            reverse_kl_N=floats(delta),
            forward_kl_N=floats(forward),
            teacher_entropy_N=floats(teacher),
            top1_agree_N=None,
            grad_norm_N=floats(grad),
            teacher_rank_N=None if rank is None else torch.as_tensor(rank, dtype=torch.int64),
            teacher_mass_N=floats(mass),
            log_ratio_N=floats(ratio),
            token_ids_N=None if ids is None else torch.as_tensor(ids, dtype=torch.int64),
            vocab_size=vocab,
        )

    return make


@pytest.fixture(scope="session")
def random_stats(make_stats) -> MakeStats:
    """Tokens of several rollouts, interleaved, with heavy-tailed divergences and many near-zero entropies."""

    def make(tokens: int, rollouts: int, seed: int) -> TokenStats:
        rng = np.random.default_rng(seed)
        return make_stats(
            rollout=rng.integers(0, rollouts, tokens) * 7 - 3,
            h=rng.gamma(0.3, 1.0, tokens),
            delta=rng.gamma(0.2, 2.0, tokens),
            forward=rng.gamma(0.2, 2.0, tokens),
            teacher=rng.gamma(0.1, 1.0, tokens),
            grad=rng.random(tokens),
            rank=rng.integers(0, 12, tokens),
            ids=rng.integers(0, 64, tokens),
            mass=rng.beta(4.0, 1.0, tokens),
            ratio=rng.normal(0.0, 1.0, tokens),
            vocab=64,
        )

    return make


class Naive:
    """The paper's formulas, a loop a rollout, in fp64 numpy."""

    @staticmethod
    def budget(retention: float, tokens: int) -> int:
        return max(1, int(np.floor(retention * tokens + 1e-9)))

    @staticmethod
    def min_max(values: np.ndarray, clip_quantile: float) -> np.ndarray:
        clipped = np.minimum(values, np.quantile(values, clip_quantile))
        width = clipped.max() - clipped.min()
        return (clipped - clipped.min()) / width if width > 0 else np.zeros_like(values)

    def scaled(self, values: np.ndarray, rollout: np.ndarray, clip_quantile: float, scope: str) -> np.ndarray:
        if scope != "rollout":
            return self.min_max(values, clip_quantile)
        out = np.empty_like(values)
        for one in np.unique(rollout):
            out[rollout == one] = self.min_max(values[rollout == one], clip_quantile)
        return out

    def score(self, rule: str, stats: TokenStats, scope: str = "batch", clip: float = 0.98, delta_clip: float = 1.0):
        rollout = stats.rollout_N.numpy()
        h, delta, forward = (
            field.numpy().astype(np.float64) for field in (stats.entropy_N, stats.reverse_kl_N, stats.forward_kl_N)
        )
        if rule in ("entropy", "divergence"):
            return h if rule == "entropy" else delta
        h_hat = self.scaled(h, rollout, clip, scope)
        if rule == "q3":
            return forward * (1 - h_hat)
        if rule == "teachability":
            mass = stats.teacher_mass_N.numpy().astype(np.float64)
            return self.scaled(delta, rollout, 0.95, scope) * mass
        delta_hat = self.scaled(delta, rollout, delta_clip, scope)
        soft_or = h_hat + delta_hat - h_hat * delta_hat
        return soft_or if rule == "soft_or" else -soft_or

    def top(self, score: np.ndarray, rollout: np.ndarray, retention: float) -> np.ndarray:
        kept = np.zeros(len(score), dtype=bool)
        for one in np.unique(rollout):
            rows = [row for row in range(len(score)) if rollout[row] == one]
            best = sorted(rows, key=lambda row: (-score[row], row))
            kept[best[: self.budget(retention, len(rows))]] = True
        return kept

    def assert_same_mask(self, kept_N: torch.Tensor, score: np.ndarray, rollout: np.ndarray, retention: float) -> None:
        """Equal to `top`, but for tokens within 1e-5 of their rollout's cut."""
        expected = self.top(score, rollout, retention)
        for row in np.flatnonzero(kept_N.numpy() != expected):
            cut = score[expected & (rollout == rollout[row])].min()
            # What selectors promise, and fp32 scores against fp64 ones need.
            assert abs(score[row] - cut) <= 1e-5 * max(1.0, abs(cut)), f"row {row}: {score[row]} against cut {cut}"
        for one in np.unique(rollout):
            assert kept_N.numpy()[rollout == one].sum() == expected[rollout == one].sum()


@pytest.fixture(scope="session")
def naive() -> Naive:
    return Naive()
