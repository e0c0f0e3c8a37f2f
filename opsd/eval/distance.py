"""`opsd distance`: how far a model is from its teacher on held-out prompts, on its own answers and on the teacher's.

A continuous measure: it distinguishes models even if all their answers are wrong. Divergences are exact, over the whole
vocabulary, in nats per token. A prompt's value is the mean over the tokens of its answers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from opsd.config.settings import EvaluationSettings, LengthSettings, PositiveInt, PromptSettings
from opsd.data.packing import pack
from opsd.data.prompts import digest, load_prompts
from opsd.data.rendering import PromptFormat
from opsd.data.template import Clock, steady
from opsd.distill import concatenate_stats, token_stats
from opsd.eval.evaluator import score_problem
from opsd.eval.grading import load_grader
from opsd.model.checks import Reach, length_switches
from opsd.model.loading import load_scorer, load_tokenizer
from opsd.model.positions import Span
from opsd.model.scorer import Scorer
from opsd.model.vocabulary import check_ids, shared_vocabulary
from opsd.rollout import HFRollout
from opsd.run.began import time_of_run
from opsd.selection import TokenStats
from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.distributed import local_device
from opsd.utils.errors import DAMAGED, UserError, said
from opsd.utils.seeding import derive_seed

# Per-token statistics, and the names of their means.
TOKEN_MEASURES = {
    "reverse_kl_N": "reverse_kl_nats",
    "forward_kl_N": "forward_kl_nats",
    "top1_agree_N": "top1_agree",
    "entropy_N": "entropy_nats",
}


@dataclass(frozen=True, kw_only=True)
class DistanceCommand(PromptSettings, EvaluationSettings, LengthSettings):
    """A model's exact divergence from its teacher on held-out prompts. Writes FILE.json, with a value per prompt."""

    model: str
    """Folder (or hub name) of the model."""
    teacher: str
    """Folder (or hub name) of the teacher; it must share the model's vocabulary."""
    prompts: str
    """Held-out prompts: .jsonl or .parquet. If all have gold answers, the model's own answers are graded."""
    out: str
    """Result file, FILE.json."""
    samples: PositiveInt = 1
    """Answers per prompt, from the model and from the teacher."""
    generate_batch: PositiveInt = 64
    """Answers generated in one batch."""
    teacher_answers: str | None = None
    """File with the teacher's answers, created if missing and read if present, so that all models of a comparison are
    measured on the same ones. None generates them anew."""
    micro_batch_tokens: PositiveInt = 4096
    """Maximum number of tokens (prompt and answer) in one forward pass."""
    trust_remote_code: bool = False
    """Run the code that comes with a model folder (auto_map); otherwise such a folder is refused."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of both models' weights and matrix products."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if available, else the CPU."""


def measure_distance(config: DistanceCommand) -> dict[str, Any]:
    """Measure, write the result file and return its content. Raises UserError for bad input."""
    device, trust = local_device(config.device, "--device"), config.trust_remote_code
    tokenizer = load_tokenizer(config.model, "--model", trust)
    steady(tokenizer, Clock(time_of_run(Path(config.model))))
    how = PromptFormat.of(config, max_tokens=config.max_prompt_tokens, limit_flag="--max_prompt_tokens")
    prompts = load_prompts(config.prompts, tokenizer, how)[0][: config.limit]
    span = Span(max(len(prompt.ids) for prompt in prompts), config.max_new_tokens, "--max_new_tokens")
    reach, dtype = Reach((span,), config.micro_batch_tokens), getattr(torch, config.dtype)
    model, teacher = (
        load_scorer(path, flag, dtype, device, trust, reach=reach).eval()
        for path, flag in ((config.model, "--model"), (config.teacher, "--teacher"))
    )
    heads = model.head.as_head(), teacher.head.as_head()
    vocab = shared_vocabulary(tokenizer, load_tokenizer(config.teacher, "--teacher", trust), *heads)
    check_ids(prompts, vocab, config.prompts)

    def answers(scorer: Scorer) -> list[Rollout]:
        switches = length_switches(scorer.model, reach.longest) if scorer.alone else frozenset[int]()
        sampler = HFRollout(scorer.model, tokenizer, config.generate_batch, vocab_size=vocab, switches=switches)
        sampling, seed = Sampling.of(config, config.max_new_tokens), derive_seed(config.seed, "distance")
        return sampler.generate(prompts, config.samples, sampling, seed)

    own, theirs = answers(model), _teacher_answers(config, prompts, lambda: answers(teacher))
    result = {
        "model": config.model,
        "settings": {**dataclasses.asdict(config), "digest": digest(prompts)},
        "prompts": [prompt.id for prompt in prompts],
        "own": token_means(model, teacher, own, prompts, config, vocab) | _by_answers(own, prompts, config, tokenizer),
        "teacher": token_means(model, teacher, theirs, prompts, config, vocab),
    }
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result) + "\n")
    return result


def summary(result: dict[str, Any]) -> str:
    """One line per measure: its mean over prompts and the standard error."""
    lines = []
    for where, whose in (("own", "its own answers"), ("teacher", "the teacher's answers")):
        for name, values in result[where].items():
            of = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
            error = f" ± {float(of.std() / len(of) ** 0.5):.4f}" if len(of) > 1 else ""
            lines.append(f"{name} on {whose}: {float(of.mean()):.4f}{error}" if len(of) else f"{name} on {whose}: -")
    return "\n".join(lines)


@torch.no_grad()
def token_means(
    model: Scorer, teacher: Scorer, answers: list[Rollout], prompts: list[Prompt], config: DistanceCommand, vocab: int
) -> dict[str, list[float | None]]:
    """For each measure its mean over the tokens of each prompt's answers; None for a prompt without tokens.

    answers: `config.samples` per prompt, in order, with ids that count from 0.
    """
    device, parts = model.head.weight.device, []
    for micro in pack(answers, config.micro_batch_tokens):
        micro = micro.to(device)
        hidden = model.hidden(micro), model.head.as_head(), teacher.hidden(micro), teacher.head.as_head()
        parts.append(token_stats(*hidden, rollout_N=micro.rollout_N, needs=frozenset(TOKEN_MEASURES), vocab_size=vocab))
    return _by_prompt(concatenate_stats(parts), len(prompts), config.samples)


def _by_prompt(stats: TokenStats, prompts: int, samples: int) -> dict[str, list[float | None]]:
    prompt_N = stats.rollout_N.cpu() // samples
    tokens_P = torch.bincount(prompt_N, minlength=prompts)
    found: dict[str, list[float | None]] = {}
    for field, name in TOKEN_MEASURES.items():
        sum_P = torch.bincount(prompt_N, getattr(stats, field).cpu().double(), prompts)
        pairs = zip(sum_P.tolist(), tokens_P.tolist(), strict=True)
        found[name] = [value / count if count else None for value, count in pairs]
    return found


def _by_answers(
    answers: list[Rollout], prompts: list[Prompt], config: DistanceCommand, tokenizer: Any
) -> dict[str, list[float | None]]:
    """Each prompt's mean length in tokens and the fraction of its answers that were truncated; if all prompts have gold
    answers, also the fraction that is right."""
    samples, grader = config.samples, load_grader(config.grader, "--grader")
    own = [answers[place * samples : (place + 1) * samples] for place in range(len(prompts))]
    found: dict[str, list[float | None]] = {
        "tokens": [sum(len(answer.response_ids) for answer in some) / samples for some in own],
        "truncated": [sum(answer.truncated for answer in some) / samples for some in own],
    }
    if all(prompt.answer is not None for prompt in prompts):
        records = (score_problem(*pair, grader, tokenizer) for pair in zip(prompts, own, strict=True))
        found["accuracy"] = [sum(record.correct) / samples for record in records]
    return found


def _teacher_answers(
    config: DistanceCommand, prompts: list[Prompt], make: Callable[[], list[Rollout]]
) -> list[Rollout]:
    """The teacher's answers, from their file if it exists. Raises UserError if the file has other answers."""
    names = ("teacher", "samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "dtype")
    key = {"prompts": digest(prompts), **{name: getattr(config, name) for name in names}}
    file = None if config.teacher_answers is None else Path(config.teacher_answers)
    if file is not None and file.exists():
        return _read_answers(file, key, prompts, config.samples)
    answers = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [[answer.response_ids, answer.truncated] for answer in answers]
        file.write_text(json.dumps({"of": key, "answers": rows}) + "\n")
    return answers


def _read_answers(file: Path, key: dict[str, Any], prompts: list[Prompt], samples: int) -> list[Rollout]:
    with said(f"--teacher_answers {file} cannot be read", "remove it, to generate it again", *DAMAGED):
        found = json.loads(file.read_text())
        of, rows = found["of"], found["answers"]
        answers = [Rollout(number, prompts[number // samples], *row) for number, row in enumerate(rows)]
    if of != key or len(answers) != samples * len(prompts):
        raise UserError(
            f"--teacher_answers {file} holds answers to other prompts, from another teacher or with other sampling "
            "settings; give another file, or remove this one"
        )
    return answers
