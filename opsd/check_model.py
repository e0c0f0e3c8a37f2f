"""`opsd check-model FOLDER`: check what `opsd train` requires of a model, one line per check."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from opsd.config.settings import PositiveInt, Settings
from opsd.model.checks import Reach, check_causal, check_packing, check_steady, difference, switches
from opsd.model.files import as_saved, check_sampled, copy_rest, make_savable
from opsd.model.loading import disable_dropout, load_ends, load_model, load_tokenizer, running, settle_layout
from opsd.model.positions import Span, check_positions, positions
from opsd.model.scorer import DistillHead, Scorer
from opsd.model.stops import named, turn_ends
from opsd.model.transform import find_transform
from opsd.model.vocabulary import check_ends, model_vocabulary
from opsd.types import PLAIN, Head
from opsd.utils.distributed import local_device
from opsd.utils.errors import UserError, said

CLOSE = 1e-3
# Longest sequence tested, in tokens, unless --tokens is given.
TOKENS = 512


@dataclass(frozen=True)
class CheckModelConfig(Settings):
    """Check whether a model can be trained or serve as a teacher: the checks of `opsd train`, one line each; exit code
    0 or 2."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """Model folder in the Hugging Face format."""
    tokens: PositiveInt | None = None
    """Longest sequence of the planned run, in tokens: lengths at which a model's behaviour changes are tested up to it.
    None: 512, or as many as the model has positions, if fewer."""
    vllm: bool = True
    """Also check vLLM, if it is installed; it takes half a minute to start."""
    trust_remote_code: bool = False
    """Run the code that comes with the folder (auto_map); otherwise such a folder is refused."""
    device: str = "auto"
    """auto: CUDA if available, else the CPU; or cpu, or cuda."""


@dataclass
class Report:
    """The checks so far: whether each passed, its name, and its line."""

    lines: list[tuple[bool, str, str]] = field(default_factory=list)

    def check(self, what: str, act: Callable[[], str]) -> bool:
        """Run a check; record and print the line it returns, or its UserError. Returns whether it passed."""
        try:
            said, fine = act(), True
        except UserError as error:
            said, fine = str(error), False
        self.lines.append((fine, what, said))
        print(f"{'ok' if fine else 'NO':3} {what:15} {said}", flush=True)
        return fine

    @property
    def fine(self) -> bool:
        """Whether all checks passed."""
        return all(fine for fine, *_ in self.lines)


def check_model(config: CheckModelConfig) -> Report:
    """Print a line for each check. If the weights cannot be loaded, the checks that need them are skipped."""
    report, found = Report(), _Found(config)
    report.check("tokenizer", found.tokenizer)
    if not report.check("weights", found.weights):
        return report
    if report.fine:
        for what, act in (("vocabulary", found.vocabulary), ("template", found.template), ("end tokens", found.ends)):
            report.check(what, act)
    for what, act in (
        ("positions", found.positions),
        ("head", found.head),
        ("head, served", found.served_head),
        ("rows", found.rows),
        ("ZeRO-3", found.one_row),
        ("sampled", found.sampled),
        ("train = eval", found.steady),
        ("save, reload", found.saved),
        ("sent to vLLM", found.sent),
    ):
        report.check(what, act)
    if config.vllm and importlib.util.find_spec("vllm") is not None:
        report.check("vLLM", found.vllm)
    return report


class _Found:
    """The model and what is known about it. Every public method is a check: it returns a line, or raises UserError."""

    def __init__(self, config: CheckModelConfig) -> None:
        self._config, self._name = config, f"model {config.folder}"
        self._device = local_device(config.device)
        self._tokenizer: Any = None
        self._model: Any = None
        self._scorer: Any = None
        self._transform, self._reach = PLAIN, _reach(config.tokens or TOKENS)

    def tokenizer(self) -> str:
        """The tokenizer can be loaded."""
        self._tokenizer = load_tokenizer(self._config.folder, "model", self._config.trust_remote_code)
        return f"{len(self._tokenizer.get_vocab()):,} tokens"

    def weights(self) -> str:
        """The saved weights match the model's parameters one to one."""
        self._model = load_model(
            self._config.folder, "model", torch.float32, self._device, self._config.trust_remote_code
        )
        disable_dropout(self._model)
        if self._config.tokens is None:
            self._reach = _reach(min(TOKENS, positions(self._model.config) or TOKENS))
        return f"{sum(p.numel() for p in self._model.parameters()):,} parameters, all of them the model's"

    def vocabulary(self) -> str:
        """There is a row for every token that can occur in a text."""
        size = model_vocabulary(self._tokenizer, self._model, self._name)
        return f"{size:,} ids are sampled and scored, of {self._model.get_output_embeddings().weight.shape[0]:,} rows"

    def template(self) -> str:
        """The chat template works, if there is one; not every run needs one."""
        if self._tokenizer.chat_template is None:
            return "none: prompts can only be raw (--prompt_format raw)"
        messages = [{"role": "user", "content": "1+1"}]
        with said(f"{self._name}: its chat template fails", "fix it"):
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return f"a message of {len(self._tokenizer('1+1').input_ids)} tokens becomes {len(ids)}"

    def ends(self) -> str:
        """Which tokens end a response."""
        size = model_vocabulary(self._tokenizer, self._model, self._name)
        ends = turn_ends(self._model.generation_config, self._tokenizer, chat=True)
        check_ends(ends, size, self._name)
        if not ends:
            return "none: every response runs to the length limit"
        known = [named(token, self._tokenizer) if token < size else "not in the vocabulary, ignored" for token in ends]
        return ", ".join(f"{token} ({name})" for token, name in zip(ends, known, strict=True))

    def positions(self) -> str:
        """The model has enough positions for the run's sequences."""
        check_positions(self._model.config, self._reach.spans, self._name)
        known = positions(self._model.config)
        return f"{self._reach.longest:,} tokens, {'no limit in config.json' if known is None else f'of {known:,}'}"

    def head(self) -> str:
        """The logits are computed in a known way."""
        with running(self._name):
            self._transform = find_transform(self._model, self._name)
        return f"logits are {_in_words(DistillHead.of(self._model, self._transform).as_head())}"

    def served_head(self) -> str:
        """The same for the folder as that of a served teacher."""
        trust = self._config.trust_remote_code
        with running(self._name):
            find_transform(load_ends(self._config.folder, "model", torch.float32, trust), self._name)
        return "can be loaded for --teacher.kind vllm"

    def rows(self) -> str:
        """Sequences do not affect each other, and no token affects those before it."""
        # Runs even if the head is unknown: the result is still useful.
        self._scorer = Scorer(self._model, transform=self._transform)
        with running(self._name):
            check_causal(self._scorer, self._name)
            settle_layout(self._scorer, self._name, self._reach)
        tried = ", ".join(map(str, switches(self._model.config, self._reach.longest)))
        past = f"; tried past {tried} tokens" if tried else ""
        return f"sequences are {self._scorer.layout} and do not affect each other{past}"

    def one_row(self) -> str:
        """The same in one packed row, as ZeRO-3 needs it. A model may fail this and still be trained without ZeRO-3."""
        whole = Scorer(self._model, packed=True, transform=self._transform)
        try:
            with running(self._name):
                check_packing(whole, self._name, self._reach)
        except UserError as error:
            return f"not with --engine.zero_stage 3 ({error})"
        return "sequences can be packed into one row"

    def sampled(self) -> str:
        """Decoding with transformers agrees with the model. A model that fails this may be sampled with vLLM."""
        from opsd.rollout.decode import needs_like_lengths

        try:
            alike = needs_like_lengths(self._model, nullcontext)
        except UserError as error:
            return f"not with --rollout.engine hf ({error})"
        return f"rows of {'the same length' if alike else 'any length'} can be decoded in one batch with a cache"

    def steady(self) -> str:
        """The distribution is the same in training and evaluation mode."""
        with running(self._name):
            check_steady(self._scorer, self._name)
        return "hidden states are the same in training and evaluation, and in repeated calls"

    def saved(self) -> str:
        """A saved checkpoint gives the same logits."""
        notes = make_savable(self._model, self._tokenizer, self._config.folder, "model") if self._tokenizer else []
        own = self._states(self._model)
        with tempfile.TemporaryDirectory() as place:
            self._model.save_pretrained(place)
            copy_rest(Path(self._config.folder), Path(place))
            again = load_model(place, "its checkpoint", torch.float32, self._device, self._config.trust_remote_code)
            gap = difference(self._states(again), own)
        if gap > CLOSE:
            raise UserError(
                f"{self._name}: the saved checkpoint is not the same model (its logits differ by {gap:.1g}, relative)"
            )
        return "; ".join(["a checkpoint has the same logits", *notes])

    def sent(self) -> str:
        """The weights have the names that vLLM reads."""
        check_sampled(self._model, self._config.folder, "model")
        return "under the names of the folder's files"

    def vllm(self) -> str:
        """vLLM's log-probabilities agree with the model's own, before and after all weights are sent to it."""
        from opsd.rollout.probe import TOLERANCE_NATS
        from opsd.rollout.vllm import VLLMSampler

        limit = min(64, positions(self._model.config) or 64)
        ids = (torch.arange(5, 5 + limit - 1) % self._model.config.get_text_config().vocab_size).tolist()
        with _quiet_stderr(), said(f"{self._name}: vLLM cannot load it", "sample with transformers", Exception):
            trust = self._config.trust_remote_code
            sampler = VLLMSampler(self._config.folder, [], self._device, "float32", limit, 4, trust=trust)
        own = self._log_probs(ids)
        first = _mean_gap(sampler.score(ids), own)
        named = self._model.named_parameters(remove_duplicate=False)
        with said(f"{self._name}: vLLM cannot reload its weights", "sample with transformers", Exception):
            sampler.load(piece for name, weight in named for piece in as_saved(self._model, name, weight.detach()))
            second = _mean_gap(sampler.score(ids), own)
        gaps = f"log-probabilities differ by {first:.1g} nats per token, by {second:.1g} after all weights were sent"
        if not max(first, second) <= TOLERANCE_NATS["float32"]:
            raise UserError(f"{self._name}: {gaps}; at most {TOLERANCE_NATS['float32']:g} are allowed")
        return gaps

    @torch.no_grad()
    def _states(self, model: Any) -> Tensor:
        ids = torch.arange(16, device=self._device)[None] % model.config.get_text_config().vocab_size
        return model.eval()(input_ids=ids, use_cache=False).logits[0]

    @torch.no_grad()
    def _log_probs(self, ids: list[int]) -> Tensor:
        """The log-probability of every token but the first, in nats."""
        given = torch.tensor([ids], device=self._device)
        log_probs_LV = self._model.eval()(input_ids=given, use_cache=False).logits[0].float().log_softmax(-1)
        return log_probs_LV[:-1].gather(-1, given[0, 1:, None])[:, 0].cpu()


def _reach(tokens: int) -> Reach:
    return Reach((Span(0, tokens, "--tokens"),), tokens)


def _in_words(head: Head) -> str:
    """How logits are computed from hidden states."""
    scale, softcap = head.transform.scale, head.transform.softcap
    said = "hidden·head" if head.bias_V is None else "hidden·head + bias"
    said += "" if scale == 1.0 else f", times {scale:g}"
    return said if softcap is None else f"{said}, soft cap {softcap:g}"


def _mean_gap(ours: list[float], own: Tensor) -> float:
    return float((torch.tensor(ours) - own).abs().mean())


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence file descriptor 2 itself: vLLM's C++ code and child processes write to it directly."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
