"""Token selection inside TRL's DistillationTrainer, in one line.

    tip(DistillationTrainer)(student, teacher, args, …, selector="soft_or", selector_options={"retention": 0.5})

    with selecting("soft_or", retention=0.5):    # every DistillationTrainer made in here selects
        main()

or `python -m tip_patch.trl`, TRL's own script with additional flags. docs/trl.md says what selection does and costs.
"""
# ruff: noqa: E402

from __future__ import annotations

from tip_patch.adapters.trl_checks import check_context, check_installed, check_parameters, check_trainer

check_installed()

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer import distillation_trainer
from trl.trainer.distillation_trainer import DistillationTrainer

from opsd.distill.chunks import ChunkBound
from opsd.distill.inputs import LossSpec
from opsd.distill.select import Choice, choose_beforehand
from opsd.selection import TokenSelector, TokenStats, load_selector, with_defaults
from opsd.types import Stops
from opsd.utils.errors import UserError
from opsd.utils.seeding import derive_seed
from tip_patch.adapters.trl_loss import CONTEXT, ENGINES, ROLLOUT, SAVED, Call, Returned, Selected, score
from tip_patch.adapters.trl_step import StepEnd

# Every TRL function that we hook into or call, and its parameters in trl 1.16.
LOSS = "_chunked_divergence_loss"
check_parameters(
    {
        DistillationTrainer._generate_and_score_completions: "self inputs",
        DistillationTrainer._prepare_inputs: "self generation_batch",
        DistillationTrainer._compute_loss: "self unwrapped_student inputs num_items_in_batch",
        ChunkedDivergenceFunction.backward: "ctx grad_divergence _",
        getattr(distillation_trainer, LOSS): "student_hidden_states teacher_hidden_states student_lm_head_weight "
        "teacher_lm_head_weight completion_mask beta num_items_in_batch student_lm_head_bias teacher_lm_head_bias "
        "student_logit_scale teacher_logit_scale student_final_logit_softcapping teacher_final_logit_softcapping "
        "temperature",
    }
)
check_context(ChunkedDivergenceFunction, CONTEXT, SAVED)

Micro = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to select; see Selecting. Raises UserError for invalid settings."""

    selector: str | TokenSelector | None = "soft_or"
    selector_options: dict[str, Any] | None = None
    engine: str = "kernel"
    seed: int | None = None
    telemetry_every: int | None = None
    token_record: str | Path | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"engine {self.engine!r}: give {' or '.join(ENGINES)}")
        if self.selector_options and not isinstance(self.selector, str):
            raise UserError("selector_options belong to a selector's name: give the options to the selector itself")
        self.rule()

    @staticmethod
    def taken_from(named: dict[str, Any]) -> dict[str, Any]:
        """The settings among a call's keyword arguments; they are removed from `named`."""
        return {one.name: named.pop(one.name) for one in fields(Settings) if one.name in named}

    def rule(self) -> TokenSelector | None:
        """The selector; a new one if it was given by name."""
        if isinstance(self.selector, str):
            return load_selector(self.selector, **(self.selector_options or {}))
        return None if self.selector is None else with_defaults(self.selector)


@dataclass
class Tip:
    """How a trainer selects, and the state of its current step.

    first_seed: determines all random choices. seed: this step's. stops: the tokens that end an answer. micros: the
    step's micro-batches. choices: how the tokens of each are chosen. kept: the announced count over all ranks; None
    if it is determined within the loss. scored: statistics computed beforehand. done: the result of each
    micro-batch.
    """

    selector: TokenSelector | None
    engine: Callable[[Call, Choice, LossSpec], tuple[Returned, Selected]]
    first_seed: int
    stops: Stops
    chunks: ChunkBound = field(default_factory=lambda: ChunkBound("auto"))
    seed: int = 0
    micros: list[Micro] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    kept: int | None = None
    scored: list[TokenStats] = field(default_factory=list)
    done: list[Selected] = field(default_factory=list)


class Selecting(DistillationTrainer):
    """The base class that `tip` puts in front of a trainer class.

    selector: a rule's name (`opsd selectors`), "module:Name", or a TokenSelector; "all" trains on every token.
    selector_options: the rule's own, such as retention and normalise_over. engine: "kernel" is TRL's own divergence,
    "fused" ours. seed: of random choices; None: args.seed. telemetry_every: steps between quadrant shares
    and overlaps, None: as often as TRL logs, 0: never. token_record: a folder for `opsd inspect`, written at the same
    steps. Errors: UserError for invalid settings.
    """

    tip: Tip
    _closes: StepEnd
    _use: Callable[[Call], Returned]
    _planned: list[Micro] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = Settings(**Settings.taken_from(kwargs))
        super().__init__(*args, **kwargs)
        self.select(settings)

    def select(self, settings: Settings) -> None:
        """Start to select, after the trainer's own constructor has returned."""
        seed, record = settings.seed, settings.token_record
        stops = Stops(tuple(token for token in self.eos_token_ids if token is not None))
        self.tip = Tip(settings.rule(), ENGINES[settings.engine], self.args.seed if seed is None else seed, stops)
        self._closes = StepEnd(self, settings.telemetry_every, None if record is None else Path(record))
        self.add_callback(self._closes)
        self._use, self._planned = self._train_on, None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Micro:
        """TRL's, plus an id for each answer, unique over the step and all ranks: TRL shuffles answers afterwards."""
        batch = super()._generate_and_score_completions(inputs)
        if self._is_training:
            answers = batch["completion_ids"].shape[0]
            first = self.accelerator.process_index * answers
            batch[ROLLOUT] = torch.arange(first, first + answers, device=batch["completion_ids"].device)
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Micro:
        """TRL's; if it has generated a step's answers, plan the step."""
        inputs = super()._prepare_inputs(generation_batch)
        written: Any = self._buffered_inputs
        if self._is_training and written is not self._planned:
            self._planned = written
            self._plan(written[: self.current_gradient_accumulation_steps])
        return inputs

    def _compute_loss(self, unwrapped_student: Any, inputs: Micro, num_items_in_batch: Any) -> Returned:
        """TRL's, with our function in place of the one that computes the loss from both models' hidden states."""
        if ROLLOUT not in inputs:
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

        def instead(*args: Any, **named: Any) -> Returned:
            return self._use(Call.of(own, inputs, self.tip.stops, args, named))

        own = getattr(distillation_trainer, LOSS)
        with replaced(distillation_trainer, LOSS, instead):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    def _plan(self, micros: list[Micro]) -> None:
        """Decide how the step's tokens are chosen, and what the loss is divided by.

        Masks are made beforehand if the choice or the count needs to see the whole step and the step has several
        micro-batches; otherwise they are made within the loss, without an extra forward pass.
        """
        tip, selector, step = self.tip, self.tip.selector, self.state.global_step + 1
        tip.micros, tip.scored, tip.done = micros, [], []
        tip.seed = derive_seed(tip.first_seed, "select", step)
        alone = self.accelerator.num_processes == 1 and len(micros) == 1
        watched = self._closes.statistics_due(step)
        choice = Choice(selector, seed=tip.seed, watch=watched, whole_step=alone)
        tip.choices = [choice] * len(micros)
        if selector is None:
            tip.kept = None
        elif not alone and (selector.normalise_over == "batch" or not selector.fixed_budget):
            tip.scored = self._score(watched | selector.needs | selector.needs_kept)
            selections = choose_beforehand(selector, tip.scored, self._closes.ranks(), tip.seed)
            tip.choices = [Choice(selection=selection) for selection in selections]
            self._announce(sum(int(selection.kept_N.sum()) for selection in selections))
        elif selector.fixed_budget:
            lengths = [length for micro in micros for length in _loss_mask(micro).sum(1).tolist() if length]
            self._announce(sum(map(selector.budget, lengths)))
        else:
            tip.kept = None

    def _announce(self, kept: int) -> None:
        """Make TRL divide by the number of tokens that all ranks keep."""
        counts: Any = self.accelerator.gather(torch.tensor(kept, device=self.accelerator.device))
        total = counts.sum()
        self.tip.kept = int(total)
        for micro in self.tip.micros:
            micro["num_items_in_batch"] = total

    def _score(self, needs: frozenset[str]) -> list[TokenStats]:
        """The named statistics of the step's micro-batches, by a forward pass without gradient and without dropout."""
        model: Any = self.model_wrapped
        student: Any = self.accelerator.unwrap_model(model)
        found: list[TokenStats] = []

        def use(call: Call) -> Returned:
            found.append(score(call, needs, self._spec()))
            return call.return_zeros()

        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager(), replaced(self, "_use", use):
            for micro in self.tip.micros:
                self._forward_redirection(model, student, self._compute_loss, student, micro, None)
        model.train()
        return found

    def _train_on(self, call: Call) -> Returned:
        """The loss of the current micro-batch."""
        tip, number = self.tip, self._step % self.args.gradient_accumulation_steps
        (loss, entropy, tokens), selected = tip.engine(call, tip.choices[number], self._spec())
        tip.done.append(selected)
        if tip.scored and selected.stats.entropy_N is None and (entropy_N := tip.scored[number].entropy_N) is not None:
            entropy = entropy_N.sum()
        return loss, entropy, tokens

    @property
    def _is_training(self) -> bool:
        model: Any = self.model
        return model.training

    def _spec(self) -> LossSpec:
        """TRL's beta: 0 is the forward KL, 1 the reverse KL, in between the JSD."""
        name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, "jsd")
        beta = self.beta if name == "jsd" else LossSpec.beta
        return LossSpec(name, beta, self.temperature, self.tip.chunks)


@cache
def tip(trainer: type) -> Any:
    """A subclass of a TRL distillation trainer that trains on selected tokens; see Selecting for its arguments.

    Raises UserError for a trainer with which selection would be wrong.
    """
    check_trainer(trainer, DistillationTrainer)
    if issubclass(trainer, Selecting):
        return trainer
    return type(f"Tip{trainer.__name__}", (Selecting, trainer), {"__doc__": Selecting.__doc__})


@contextlib.contextmanager
def selecting(selector: str | TokenSelector | None = "soft_or", **named: Any) -> Iterator[None]:
    """Every DistillationTrainer made within this context selects, including subclasses and classes imported before it.

    named: options of the rule, and Selecting's arguments from `engine` on.
    """
    ours = Settings.taken_from(named)
    settings = Settings(selector=selector, selector_options=named, **ours)
    own = DistillationTrainer.__init__

    def begin(self: DistillationTrainer, *args: Any, **kwargs: Any) -> None:
        kind: Any = None if isinstance(self, Selecting) else tip(type(self))
        own(self, *args, **kwargs)
        if kind is not None:
            self.__class__ = kind
            Selecting.select(self, settings)  # pyrefly: ignore[bad-argument-type]

    with replaced(DistillationTrainer, "__init__", begin):
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute within the context, and restore it afterwards."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _loss_mask(micro: Micro) -> torch.Tensor:
    """Which of the positions [B, L] the student wrote."""
    mask = micro["completion_mask"]
    return mask * micro["tool_mask"] if "tool_mask" in micro else mask
