"""`opsd eval`: evaluates a model folder on suites of problems. The same command continues an interrupted evaluation."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import AutoConfig

from opsd.config.settings import EvaluationSettings, LengthSettings, PositiveInt, PromptSettings, ProperFraction
from opsd.data.prompts import digest
from opsd.data.rendering import PromptFormat
from opsd.data.template import Clock, steady
from opsd.eval.evaluator import Suite, load_suites, score_problem, statistics, unread
from opsd.eval.files import DoneProblem, EvalFiles, Header, table
from opsd.eval.grading import Grader, load_grader
from opsd.model.checks import length_switches
from opsd.model.files import files_digest
from opsd.model.loading import load_model, load_tokenizer, running
from opsd.model.positions import Span, check_positions
from opsd.model.stops import generation_of, stated_stops, turn_ends
from opsd.model.transform import check_finite
from opsd.model.vocabulary import check_ids, model_vocabulary, usable_ends, usable_rows, vocabulary_size
from opsd.rollout import HFRollout, RolloutEngine
from opsd.run.began import time_of_run
from opsd.run.console import progress_bar
from opsd.types import Prompt, Sampling
from opsd.utils.distributed import ONE_RANK, Ranks, join, local_device, world_size
from opsd.utils.errors import UserError, said
from opsd.utils.seeding import derive_seed


@dataclass(frozen=True, kw_only=True)
class EvalCommand(PromptSettings, EvaluationSettings, LengthSettings):
    """Evaluate a model on suites of problems. Writes FILE.json, FILE.md (a table) and FILE.records.jsonl (every
    problem)."""

    model: str
    """Folder (or hub name) of the model."""
    suite: tuple[str, ...]
    """NAME=FILE pairs, e.g. math500=data/math500.jsonl aime24=data/aime24.jsonl. Suites are evaluated completely: a
    problem above max_prompt_tokens is an error."""
    out: str
    """Result file, FILE.json; the table and the records are written next to it. The same command continues an
    interrupted evaluation."""
    trust_remote_code: bool = False
    """Run the code that comes with the model folder (auto_map); otherwise such a folder is refused."""
    engine: Literal["hf", "vllm"] = "hf"
    """hf: transformers generates. vllm: faster, if it is installed."""
    gpu_memory_share: ProperFraction = 0.9
    """vllm: fraction of the GPU's memory that it may use."""
    tensor_parallel: PositiveInt = 1
    """vllm: ranks that share one sampler's weights. With several samplers (started by a launcher), they split the
    responses."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights; auto: as in the model's config.json."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if available, else the CPU."""
    save_responses: bool = False
    """Store the responses' texts in the records."""
    progress: bool = True
    """Show a progress bar on a terminal."""

    def check(self) -> None:
        super().check()
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise UserError("--engine vllm: vLLM is not installed; run make setup, or give hf")
        if not self.suite:
            raise UserError("--suite is empty; give NAME=FILE, e.g. math500=data/math500.jsonl")


def evaluate(config: EvalCommand) -> None:
    """Evaluate, continue an interrupted evaluation, or show a finished one. Raises UserError for bad input."""
    files = EvalFiles(config.out)
    tokenizer = load_tokenizer(config.model, "--model", config.trust_remote_code)
    device = local_device(config.device, "--device")
    ranks = _meet(config, device)
    clock = Clock(ranks.broadcast(Clock(files.time() or time_of_run(Path(config.model))).time))
    steady(tokenizer, clock)
    suites = load_suites(config.suite, tokenizer, _prompt_format(config), config.limit, "--suite")
    grader, ends = load_grader(config.grader, "--grader"), _ends(config, tokenizer)
    header = _header(config, suites, device, ranks, clock)
    result = files.check(header)
    # All ranks check before the first one writes.
    ranks.gather(None)
    if result is None:
        engine = _engine(config, tokenizer, suites, device, ranks, ends)
        groups = _groups(suites, config, ranks)
        plan = [[(group.suite, problem.id) for problem in group.problems] for group in groups]
        done = ranks.broadcast(files.begin(header, plan) if ranks.is_main else [])
        done += _run_groups(groups, done, files, engine, grader, tokenizer, config, ranks, frozenset(ends))
        if ranks.is_main:
            records = {s.name: [one.record for one in done if one.suite == s.name] for s in suites}
            votes = grader.answer is not None
            result = header | {"suites": {name: statistics(own, votes) for name, own in records.items()}}
            files.finish(result)
    elif ranks.is_main:
        Console(stderr=True).print(f"{files.result}: finished already", highlight=False, markup=False)
    if ranks.is_main and result is not None:
        print(table(result))
        print(files.result)
        for line in unread(result, "--grader"):
            Console(stderr=True).print(f"opsd: {line}", highlight=False, markup=False, soft_wrap=True)


def _meet(config: EvalCommand, device: torch.device) -> Ranks:
    """This process among those that a launcher has started. Raises UserError if their number does not fit."""
    together = config.tensor_parallel
    if world_size() % together:
        raise UserError(
            f"--tensor_parallel {together} does not divide the {world_size()} processes; give a number that does"
        )
    if together > 1 and config.engine != "vllm":
        raise UserError(f"--tensor_parallel {together} is for --engine vllm; give 1, or that engine")
    return join(device) if world_size() > 1 else ONE_RANK


def _side_by_side(config: EvalCommand, ranks: Ranks) -> int:
    """Number of responses that all samplers together generate at once."""
    return config.generate_batch * ranks.world_size // config.tensor_parallel


@dataclass(frozen=True)
class Group:
    """Problems of one suite that are generated, graded and saved together. seed: of the sampling."""

    suite: str
    problems: list[Prompt]
    seed: int


def _groups(suites: list[Suite], config: EvalCommand, ranks: Ranks) -> list[Group]:
    """All problems in order, in groups that are generated at once. A group's samples depend only on its position."""
    size = max(1, _side_by_side(config, ranks) // config.samples)
    return [
        Group(suite.name, suite.problems[first : first + size], derive_seed(config.seed, "eval", suite.name, first))
        for suite in suites
        for first in range(0, len(suite.problems), size)
    ]


def _run_groups(
    groups: list[Group],
    done: list[DoneProblem],
    files: EvalFiles,
    engine: RolloutEngine,
    grader: Grader,
    tokenizer: Any,
    config: EvalCommand,
    ranks: Ranks,
    ends: frozenset[int],
) -> Iterator[DoneProblem]:
    """Generate, grade and save every group that is not in `done`; only the first rank grades and saves."""
    finished = {(one.suite, one.record.id) for one in done}
    sampling, samples = Sampling.of(config, config.max_new_tokens), config.samples
    total = sum(len(group.problems) for group in groups)
    with progress_bar(Console(stderr=True), total, shown=config.progress and ranks.is_main) as bar:
        task = bar.add_task(Path(config.model).name, total=total, numbers="")
        bar.advance(task, len(done))
        for group in groups:
            if (group.suite, group.problems[0].id) in finished:
                continue
            bar.update(task, numbers=group.suite)
            rollouts = engine.generate(group.problems, samples, sampling, group.seed)
            if not ranks.is_main:
                continue
            new = []
            for place, problem in enumerate(group.problems):
                own = rollouts[place * samples : (place + 1) * samples]
                texts = [tokenizer.decode(rollout.response_ids) for rollout in own] if config.save_responses else None
                new.append(DoneProblem(group.suite, score_problem(problem, own, grader, tokenizer, ends), texts))
            files.append(new)
            bar.advance(task, len(new))
            yield from new


def _header(config: EvalCommand, suites: list[Suite], device: torch.device, ranks: Ranks, clock: Clock) -> Header:
    """Everything that the numbers depend on. Suites are identified by content, not by path."""
    sampling = dataclasses.asdict(Sampling.of(config, config.max_new_tokens))
    sampling |= {"samples": config.samples, "seed": config.seed}
    names = ("prompt_format", "thinking", "grader", "engine", "dtype", "save_responses")
    settings = {name: getattr(config, name) for name in names}
    settings |= {
        "generate_batch": _side_by_side(config, ranks),
        "device": device.type,
        "weights": files_digest(Path(config.model), "*.safetensors"),
        "suite": {suite.name: digest(suite.problems) for suite in suites},
    }
    if config.stop_tokens:
        settings["stop_tokens"] = list(config.stop_tokens)
    if clock.asked:
        settings["time"] = clock.time.isoformat()
    return {"model": config.model, "step": None, "sampling": sampling, "settings": settings}


def _engine(
    config: EvalCommand, tokenizer: Any, suites: list[Suite], device: torch.device, ranks: Ranks, ends: list[int]
) -> RolloutEngine:
    """The configured sampler. Raises UserError for a model that cannot be loaded or is too short for the responses."""
    longest = max(len(problem.ids) for suite in suites for problem in suite.problems)
    if config.engine == "vllm":
        return _vllm_engine(config, tokenizer, longest, device, ranks, ends)
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    model = load_model(config.model, "--model", dtype, device, config.trust_remote_code)
    check_positions(model.config, _spans(config, longest), f"--model {config.model}")
    vocab_size = model_vocabulary(tokenizer, model, "--model")
    check_ids((problem for suite in suites for problem in suite.problems), vocab_size, "--suite")
    with running(f"--model {config.model}"), torch.no_grad():
        one_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        check_finite(model.eval()(input_ids=one_11).logits, f"--model {config.model}")
        switches = length_switches(model, longest + config.max_new_tokens)
    ends = usable_ends(ends, vocab_size, "--model")
    how = {"ranks": ranks, "vocab_size": vocab_size, "switches": switches, "eos_ids": ends}
    return HFRollout(model, tokenizer, config.generate_batch, **how)


def _ends(config: EvalCommand, tokenizer: Any) -> list[int]:
    """The tokens that end a response: those of --stop_tokens, else those that the model's folder names."""
    stated = stated_stops(config.stop_tokens, tokenizer, vocabulary_size(tokenizer), "--stop_tokens")
    generation = generation_of(config.model, config.trust_remote_code)
    return stated or turn_ends(generation, tokenizer, config.prompt_format == "chat")


def _vllm_engine(
    config: EvalCommand, tokenizer: Any, longest_prompt: int, device: torch.device, ranks: Ranks, ends: list[int]
) -> RolloutEngine:
    from opsd.rollout.vllm import VLLMSampler

    with said(f"--model {config.model}: vLLM cannot load it", "give --engine hf", OSError, ValueError, RuntimeError):
        model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        check_positions(model_config, _spans(config, longest_prompt), f"--model {config.model}")
        vocab_size = usable_rows(tokenizer, model_config.get_text_config().vocab_size, "--model")
        return VLLMSampler(
            config.model,
            usable_ends(ends, vocab_size, "--model"),
            device,
            config.dtype,
            longest_prompt + config.max_new_tokens,
            config.generate_batch,
            config.gpu_memory_share,
            config.tensor_parallel,
            ranks,
            trust=config.trust_remote_code,
            vocab_size=vocab_size,
        )


def _spans(config: EvalCommand, longest_prompt: int) -> tuple[Span, ...]:
    return (Span(longest_prompt, config.max_new_tokens, "--max_new_tokens"),)


def _prompt_format(config: EvalCommand) -> PromptFormat:
    return PromptFormat.of(config, max_tokens=config.max_prompt_tokens, limit_flag="--max_prompt_tokens")
