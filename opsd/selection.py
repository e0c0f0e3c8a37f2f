"""The interface between the trainer and token selection.

The trainer does not know any selection rule. It computes per-token statistics, passes them to a
`TokenSelector`, and trains on the rows that it keeps. Rules live in other packages and are found
by entry point (group `opsd.selectors`) or by "module:Name". Telemetry (named numbers drawn from the
same statistics, such as quadrant shares) plugs in the same way (group `opsd.telemetry`).

Legend: N student tokens of a micro-batch, or of a whole step if the docstring says so.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from opsd.utils.errors import UserError, first_line
from opsd.utils.plugins import ALL_TOKENS, SELECTOR_GROUP, check_selector_name, installed, load_path
from opsd.utils.plugins import selector_names as selector_names

TELEMETRY_GROUP = "opsd.telemetry"
# How many of the student's likeliest tokens teacher_mass_N adds up (arXiv 2605.26844: K = 16).
SUPPORT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """What is known about each student token. A field that was not requested is None.

    Shapes are [N]; divergences and entropies are fp32 nats, over the shared vocabulary and at the loss
    temperature (paper Eq. 2 without its 1/log|V|, and Eq. 3).

    rollout_N: int64 id of the rollout each token belongs to, unique over the whole step and all ranks.
    entropy_N: H(P_S). reverse_kl_N: KL(P_S‖P_T), the paper's δ. forward_kl_N: KL(P_T‖P_S).
    teacher_entropy_N: H(P_T). top1_agree_N: bool, both models' most likely token is the same.
    teacher_rank_N: int64, how many tokens the teacher finds more likely than the student's (0 = top).
    grad_norm_N: L2 norm of the logit gradient of the reverse KL. teacher_mass_N: fp32, the teacher's probability of the
    student's `SUPPORT_TOKENS` likeliest tokens. log_ratio_N: log P_T − log P_S of the sampled token, nats.
    token_ids_N: int64, the sampled token.
    stop_log_prob_N, teacher_stop_log_prob_N: log-probability (nats) that a turn ends here, by any stop token.
    stop_N: bool, the sampled token ends a turn.
    vocab_size: |V|, the size of the vocabulary that the probabilities cover.
    """

    rollout_N: torch.Tensor
    entropy_N: torch.Tensor | None
    reverse_kl_N: torch.Tensor | None
    forward_kl_N: torch.Tensor | None
    teacher_entropy_N: torch.Tensor | None
    top1_agree_N: torch.Tensor | None
    teacher_rank_N: torch.Tensor | None = None
    grad_norm_N: torch.Tensor | None = None
    teacher_mass_N: torch.Tensor | None = None
    log_ratio_N: torch.Tensor | None = None
    token_ids_N: torch.Tensor | None = None
    stop_log_prob_N: torch.Tensor | None = None
    teacher_stop_log_prob_N: torch.Tensor | None = None
    stop_N: torch.Tensor | None = None
    vocab_size: int | None = None


class Statistic(NamedTuple):
    """A statistic that is computed from logits: its type, and what it needs.

    teacher: also needs the teacher's logits. required: in every token record, and in `token_stats` unless other fields
    are named. sampled: needs the sampled tokens. metric: the name of its mean among a step's metrics. divergence: the
    divergence that it equals per token; if every token is kept, the loss yields it at no cost.
    """

    dtype: torch.dtype = torch.float32
    teacher: bool = True
    required: bool = True
    sampled: bool = False
    metric: str | None = None
    divergence: str | None = None


# The student's entropy takes one projection to logits per token, the teacher's fields a second one; the gradient norm
# reads both models' logits once more than the divergences do.
STATISTICS = {
    "entropy_N": Statistic(teacher=False, metric="student/entropy_nats"),
    "reverse_kl_N": Statistic(metric="student/reverse_kl_nats", divergence="reverse_kl"),
    "forward_kl_N": Statistic(divergence="forward_kl"),
    "teacher_entropy_N": Statistic(metric="teacher/entropy_nats"),
    "top1_agree_N": Statistic(torch.bool),
    "teacher_rank_N": Statistic(torch.int64, required=False, sampled=True),
    "grad_norm_N": Statistic(required=False),
    "teacher_mass_N": Statistic(required=False),
    "log_ratio_N": Statistic(required=False, sampled=True),
}
# Only if the run knows which tokens end a turn.
STOP_STATISTICS = {
    "stop_log_prob_N": Statistic(teacher=False, required=False),
    "teacher_stop_log_prob_N": Statistic(required=False),
}
ALL_STATISTICS = STATISTICS | STOP_STATISTICS
STOP_FIELDS = frozenset(STOP_STATISTICS)
TEACHER_FIELDS = frozenset(name for name, of in ALL_STATISTICS.items() if of.teacher)
SAMPLED_FIELDS = frozenset(name for name, of in STATISTICS.items() if of.sampled)
REQUIRED_FIELDS = frozenset(name for name, of in STATISTICS.items() if of.required)
# Known without computing logits: a selector may list them in `needs`.
GIVEN_FIELDS = frozenset({"rollout_N", "token_ids_N", "stop_N", "vocab_size"})


def field_of(divergence: str) -> str | None:
    """The statistic that equals this divergence; None if there is none."""
    return next((name for name, of in STATISTICS.items() if of.divergence == divergence), None)


@dataclass(frozen=True)
class Selection:
    """The rows to train on. kept_N: bool [N]. weight_N: fp32 [N] loss weights, or None for all ones.

    A weight multiplies a token's loss; it never changes the kept count that the loss is divided by.
    """

    kept_N: torch.Tensor
    weight_N: torch.Tensor | None = None


@runtime_checkable
class TokenSelector(Protocol):
    """A rule that keeps some of the student's tokens.

    needs: the `TokenStats` fields read over all rows. needs_kept: those read on kept rows only; they
    are scored after the choice (NaN, or 0 in integer and bool fields, outside the kept rows) and handed to
    `weigh`, which is called only when needs_kept is not empty.
    normalise_over: "micro_batch" | "rollout" | "batch" | "running"; a rule that normalises nothing says
    "micro_batch", whatever was configured. Under "batch" the trainer calls `prepare` once per step with the
    statistics of every micro-batch and rank, before any call.
    fixed_budget: True if the kept count follows from rollout lengths alone (see `budget`).
    `weigh` and `end_step` have defaults: a rule may leave them out.
    """

    needs: frozenset[str]
    needs_kept: frozenset[str]
    normalise_over: str
    fixed_budget: bool

    def budget(self, tokens: int) -> int:
        """How many of a rollout's `tokens` student tokens are kept."""
        ...

    def prepare(self, all_stats: TokenStats) -> None:
        """Take in the statistics of the whole step (scope "batch")."""
        ...

    def __call__(self, stats: TokenStats, seed: int = 0) -> Selection:
        """Choose among the rows of `stats`; random draws depend on (seed, rollout id) alone."""
        ...

    def weigh(self, stats: TokenStats, selection: Selection) -> Selection:
        """The selection with loss weights, computed from the `needs_kept` fields."""
        return selection

    def end_step(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Update the running state after a step (scope "running"); within a step it does not change.

        Called on every rank. reduce takes a CPU tensor and returns its sum over ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """What must survive a checkpoint; JSON values only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TokenTelemetry(Protocol):
    """Named numbers drawn from a step's statistics, e.g. the share of tokens in each quadrant.

    needs: the `TokenStats` fields it reads. The trainer calls it every `--telemetry.every` steps with
    the whole step's tokens (N over all micro-batches), the mask that was trained on, the selector
    (None when all tokens are kept) and the step's seed. It does not call that selector. `label_tokens` has a default.
    """

    needs: frozenset[str]

    def label_tokens(self, stats: TokenStats) -> dict[str, torch.Tensor]:
        """Columns [N] of the token record, by name."""
        return {}

    def __call__(
        self, stats: TokenStats, kept_N: torch.Tensor, selector: TokenSelector | None, seed: int
    ) -> dict[str, float]: ...


def with_defaults(selector: TokenSelector) -> TokenSelector:
    """The same rule, with defaults for methods it lacks: its class need not derive from TokenSelector."""
    return _complete(selector, TokenSelector, ("weigh", "end_step"))


def _complete(plugin: Any, protocol: type, members: tuple[str, ...]) -> Any:
    for name in members:
        if not hasattr(plugin, name):
            object.__setattr__(plugin, name, MethodType(getattr(protocol, name), plugin))
    return plugin


def describe_selectors() -> dict[str, str]:
    """Each name with the first line of its class's docstring. Loads every installed selector."""
    found = {name: point.load() for name, point in installed(SELECTOR_GROUP).items()}
    lines = {name: (inspect.getdoc(factory) or "").partition("\n")[0] for name, factory in found.items()}
    return {ALL_TOKENS: "Every token is kept: plain on-policy distillation (Eq. 1).", **lines}


def load_selector(name: str, **options: Any) -> TokenSelector | None:
    """Build a selector by entry-point name or "module:Name"; "all" gives None.

    Options are the selector's own keyword arguments (retention, normalise_over, …).
    Errors: UserError for an unknown name (with the nearest one), a module that does not import,
    or an option the selector does not take.
    """
    if name == ALL_TOKENS:
        return None
    factory = _selector_factory(name)
    unknown = [option for option in options if not _takes(factory, option)]
    if unknown:
        accepted = ", ".join(inspect.signature(factory).parameters) or "none"
        give = "give its class that argument: every rule receives it; " if unknown[0] == "retention" else ""
        raise UserError(f"selector {name!r} takes no option {unknown[0]!r}; {give}it takes: {accepted}")
    try:
        selector: Any = factory(**options)
    except UserError:
        raise
    except Exception as error:  # the rule may be the user's own code
        raise UserError(f"selector {name!r} cannot be made ({type(error).__name__}: {first_line(error)})") from error
    _check_selector(selector, name)
    return with_defaults(selector)


def selector_takes(name: str, option: str) -> bool:
    """Whether a selector has an option of that name. Raises UserError if there is no such selector."""
    return _takes(_selector_factory(name), option)


def _selector_factory(name: str) -> Any:
    """The class or function that builds the selector of that name."""
    found = installed(SELECTOR_GROUP)
    check_selector_name(name)
    factory: Any = found[name].load() if name in found else load_path(name, "selector", "'module:Name'")
    if not callable(factory):
        raise UserError(f"selector {name!r} is a {type(factory).__name__}; give the name of a class")
    return factory


def _takes(factory: Any, option: str) -> bool:
    accepted = inspect.signature(factory).parameters
    return option in accepted or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())


def _check_selector(selector: Any, name: str) -> None:
    """Raises UserError if `selector` is not a TokenSelector, or needs an unknown statistic."""
    wanted = [*inspect.get_annotations(TokenSelector), "budget", "prepare", "state_dict", "load_state_dict", "__call__"]
    lacking = [attribute for attribute in wanted if not hasattr(selector, attribute)]
    if lacking:
        raise UserError(
            f"selector {name!r} is not a TokenSelector: it has no {lacking[0]}; see opsd.hooks.TokenSelector"
        )
    known = {field.name for field in dataclasses.fields(TokenStats)}
    for field in (*selector.needs, *selector.needs_kept):
        if field not in known:
            raise UserError(f"selector {name!r} needs the statistic {field!r}; known: {', '.join(sorted(known))}")


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """The run's telemetry options that telemetry installed here accepts: the run may come from another machine."""
    known = set().union(*(inspect.signature(factory).parameters for factory in _telemetry()))
    return {name: value for name, value in options.items() if name in known}


def _telemetry() -> list[Any]:
    return [point.load() for point in installed(TELEMETRY_GROUP).values()]


def load_telemetry(options: dict[str, Any] | None = None) -> list[TokenTelemetry]:
    """All installed telemetry, in order of name; each is built with those of `options` that it takes.

    Errors: UserError for an option that none of them takes.
    """
    options, factories = options or {}, _telemetry()
    accepted = [set(inspect.signature(factory).parameters) for factory in factories]
    known = set().union(*accepted)
    for key in options:
        if key not in known:
            raise UserError(f"telemetry takes no option {key!r}; it takes: {', '.join(sorted(known))}")
    return [
        _complete(factory(**{key: options[key] for key in options.keys() & takes}), TokenTelemetry, ("label_tokens",))
        for factory, takes in zip(factories, accepted, strict=True)
    ]
