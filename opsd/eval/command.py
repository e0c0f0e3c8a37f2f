"""`opsd eval`: a model folder on suites of problems. Killed, it goes on where it was: the same command again."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from opsd.config.checks import MOST
from opsd.data.prompts import PromptFormat, digest
from opsd.data.template import Clock, steady
from opsd.eval.evaluator import Suite, load_suites, score_problem, statistics
from opsd.eval.files import DoneProblem, EvalFiles, Header, table
from opsd.eval.grading import Grader, load_grader
from opsd.model.checks import check_height
from opsd.model.loading import load_model, load_tokenizer
from opsd.model.vocabulary import vocabulary_size
from opsd.rollout import HFRollout, RolloutEngine
from opsd.rollout.hf import eos_token_ids
from opsd.run.began import time_of_run
from opsd.types import Prompt, Sampling
from opsd.utils.distributed import ONE_RANK, Ranks, join, local_device, world_size
from opsd.utils.errors import UserError, first_line
from opsd.utils.seeding import derive_seed


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a model on suites of problems: FILE.json, FILE.md (a table), FILE.records.jsonl (every problem)."""

    model: str
    """Folder (or hub name) of the model."""
    suite: tuple[str, ...]
    """NAME=FILE pairs, e.g. math500=data/math500.jsonl aime24=data/aime24.jsonl."""
    out: str
    """The result, FILE.json; table and records go beside it. The same command again goes on where it was."""
    samples: int = 16
    """Responses per problem (the k of mean@k)."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. Nothing is inherited from the model's generation_config."""
    top_p: float = 1.0
    """Nucleus mass; 1.0 is off."""
    top_k: int = 0
    """Most likely tokens sampled from; 0 is off."""
    max_new_tokens: int = 8192
    """Longest response, in tokens; one that reaches it is truncated, and wrong."""
    max_prompt_tokens: int = 2048
    """Longest prompt accepted, in tokens; a suite with a longer one is an error, for it is evaluated whole."""
    seed: int = 1234
    """Sampling seed."""
    limit: int | None = None
    """Only the first so many problems of each suite."""
    grader: str = "math"
    """math: math-verify on the last boxed or final answer. suffix: the response ends with the gold answer.
    Or module:function(response, gold) -> bool."""
    prompt_format: Literal["chat", "raw"] = "chat"
    """chat applies the tokenizer's template; raw encodes the prompt as it stands."""
    thinking: Literal["on", "off"] = "off"
    """Thinking mode of the chat template."""
    trust_remote_code: bool = False
    """Run the code that the model folder brings along (auto_map); else such a folder is refused."""
    prompt_field: str = "prompt"
    """Column that holds the prompt (a string or a list of chat messages)."""
    answer_field: str = "answer"
    """Column that holds the gold answer."""
    engine: Literal["hf", "vllm"] = "hf"
    """hf: transformers generate. vllm: faster, where it is installed."""
    gpu_memory_share: float = 0.9
    """vllm: fraction of the GPU's memory that it may take."""
    tensor_parallel: int = 1
    """vllm: ranks that share one sampler's weights. Started by a launcher, all samplers share the responses out."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights; auto is what the model's config.json says."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is available."""
    generate_batch: int = 256
    """Responses generated side by side; so many are also graded and saved together."""
    save_responses: bool = False
    """Keep the responses' texts in the records."""
    progress: bool = True
    """Show a progress bar on a terminal."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "max_prompt_tokens", "generate_batch", "limit"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST:
                raise UserError(f"--{name} {value}: give a number above 0, at most {MOST}")
        if not (self.temperature >= 0.0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature {self.temperature}: give 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"--top_p {self.top_p}: give a mass in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: give 0 or more")
        if not 0.0 < self.gpu_memory_share < 1.0:
            raise UserError(f"--gpu_memory_share {self.gpu_memory_share}: give a fraction in (0, 1)")
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise UserError("--engine vllm: vLLM is not installed; run make setup, or give hf")
        if self.thinking == "on" and self.prompt_format == "raw":
            raise UserError("--thinking on is part of a chat template; give --prompt_format chat with it")
        if not self.suite:
            raise UserError("--suite is empty; give NAME=FILE, e.g. math500=data/math500.jsonl")


def evaluate(config: EvalCommand) -> None:
    """Evaluate, or finish what a killed evaluation left, or show what is finished. Raises UserError for bad input."""
    files = EvalFiles(config.out)
    tokenizer = load_tokenizer(config.model, "--model", config.trust_remote_code)
    device = _device(config.device)
    ranks = _meet(config, device)
    clock = Clock(ranks.broadcast(Clock(files.time() or time_of_run(Path(config.model))).time))
    steady(tokenizer, clock)
    suites = load_suites(config.suite, tokenizer, _prompt_format(config), config.limit, "--suite")
    grader = load_grader(config.grader, "--grader")
    header = _header(config, suites, device, ranks, clock)
    result = files.check(header)
    # Before the first rank writes, all have looked.
    ranks.gather(None)
    if result is None:
        engine = _engine(config, tokenizer, suites, device, ranks)
        groups = _groups(suites, config, ranks)
        plan = [[(group.suite, problem.id) for problem in group.problems] for group in groups]
        done = ranks.broadcast(files.begin(header, plan) if ranks.is_main else [])
        done += _run_groups(groups, done, files, engine, grader, tokenizer, config, ranks)
        records = {s.name: [one.record for one in done if one.suite == s.name] for s in suites}
        result = header | {"suites": {name: statistics(own, grader.names_answers) for name, own in records.items()}}
        if ranks.is_main:
            files.finish(result)
    elif ranks.is_main:
        Console(stderr=True).print(f"{files.result}: finished already", highlight=False, markup=False)
    if ranks.is_main:
        print(table(result))
        print(files.result)


def _meet(config: EvalCommand, device: torch.device) -> Ranks:
    """This process among those that a launcher has started. Raises UserError where they cannot share samplers out."""
    together = config.tensor_parallel
    if together < 1 or world_size() % together:
        raise UserError(
            f"--tensor_parallel {together} does not divide the {world_size()} processes; give a number that does"
        )
    if together > 1 and config.engine != "vllm":
        raise UserError(f"--tensor_parallel {together} is for --engine vllm; give 1, or that engine")
    return join(device) if world_size() > 1 else ONE_RANK


def _side_by_side(config: EvalCommand, ranks: Ranks) -> int:
    """Responses that all samplers generate side by side."""
    return config.generate_batch * ranks.world_size // config.tensor_parallel


@dataclass(frozen=True)
class Group:
    """Problems of one suite that are generated, graded and saved together. seed: of their draws."""

    suite: str
    problems: list[Prompt]
    seed: int


def _groups(suites: list[Suite], config: EvalCommand, ranks: Ranks) -> list[Group]:
    """All problems in order, as many together as go side by side. A group's draws hang on its place alone."""
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
) -> Iterator[DoneProblem]:
    """Generate, grade and save every group that is not among `done`; all but generating is the first rank's."""
    finished = {(one.suite, one.record.id) for one in done}
    sampling, samples = _sampling(config), config.samples
    with _progress_bar(config.progress and ranks.is_main) as bar:
        task = bar.add_task(Path(config.model).name, total=sum(len(group.problems) for group in groups), numbers="")
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
                new.append(DoneProblem(group.suite, score_problem(problem, own, grader, tokenizer), texts))
            files.append(new)
            bar.advance(task, len(new))
            yield from new


def _header(config: EvalCommand, suites: list[Suite], device: torch.device, ranks: Ranks, clock: Clock) -> Header:
    """Everything that decides the numbers. The suites are known by their content, wherever their files lie."""
    sampling = {**dataclasses.asdict(_sampling(config)), "samples": config.samples, "seed": config.seed}
    names = ("prompt_format", "thinking", "grader", "engine", "dtype", "save_responses")
    settings = {name: getattr(config, name) for name in names}
    settings |= {
        "generate_batch": _side_by_side(config, ranks),
        "device": device.type,
        "weights": _weights_digest(Path(config.model)),
        "suite": {suite.name: digest(suite.problems) for suite in suites},
    }
    if clock.asked:
        settings["time"] = clock.time.isoformat()
    return {"model": config.model, "step": None, "sampling": sampling, "settings": settings}


def _weights_digest(folder: Path) -> str | None:
    """Of each weight file's name, size and last MiB: enough to tell a checkpoint from another, without reading it all.

    None for a model that is no folder here.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.glob("*.safetensors") if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            content.seek(max(0, size - 2**20))
            digest.update(content.read())
    return digest.hexdigest()[:16]


def _engine(
    config: EvalCommand, tokenizer: Any, suites: list[Suite], device: torch.device, ranks: Ranks
) -> RolloutEngine:
    """The sampler of the settings. Raises UserError for a model that cannot be loaded or cannot hold the responses."""
    longest = max(len(problem.ids) for suite in suites for problem in suite.problems)
    if config.engine == "vllm":
        return _vllm_engine(config, tokenizer, longest, device, ranks)
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    model = load_model(config.model, "--model", dtype, device, config.trust_remote_code)
    _check_length(model.config, config, longest)
    check_height(tokenizer, model, "--model")
    _check_finite(model, config)
    return HFRollout(model, tokenizer, config.generate_batch, ranks=ranks)


def _vllm_engine(
    config: EvalCommand, tokenizer: Any, longest_prompt: int, device: torch.device, ranks: Ranks
) -> RolloutEngine:
    from opsd.rollout.vllm import VLLMSampler

    try:
        model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        _check_length(model_config, config, longest_prompt)
        generation = GenerationConfig.from_model_config(model_config)
        if (Path(config.model) / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(config.model)
        return VLLMSampler(
            config.model,
            eos_token_ids(generation, tokenizer),
            device,
            config.dtype,
            longest_prompt + config.max_new_tokens,
            config.generate_batch,
            config.gpu_memory_share,
            config.tensor_parallel,
            ranks,
            trust=config.trust_remote_code,
            vocab_size=vocabulary_size(tokenizer),
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"--model {config.model}: vLLM cannot load it ({reason}); give --engine hf") from error


def _check_length(settings: PretrainedConfig, config: EvalCommand, longest_prompt: int) -> None:
    """Past the positions that a model knows it writes nonsense, which would count as its score."""
    positions = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest_prompt + config.max_new_tokens > positions:
        raise UserError(
            f"--max_new_tokens {config.max_new_tokens} and a prompt of {longest_prompt} tokens are over the "
            f"{positions} positions of {config.model}; give at most {max(1, positions - longest_prompt)}"
        )


@torch.no_grad()
def _check_finite(model: PreTrainedModel, config: EvalCommand) -> None:
    model.eval()
    if not torch.isfinite(model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits).all():
        raise UserError(
            f"--model {config.model}: its logits are not finite; the weights are damaged, give another copy"
        )


def _prompt_format(config: EvalCommand) -> PromptFormat:
    return PromptFormat(
        kind=config.prompt_format,
        thinking=config.thinking,
        prompt_field=config.prompt_field,
        answer_field=config.answer_field,
        max_tokens=config.max_prompt_tokens,
        limit_flag="--max_prompt_tokens",
    )


def _sampling(config: EvalCommand) -> Sampling:
    return Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; give cpu, or auto")
    return local_device(name)


def _progress_bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
