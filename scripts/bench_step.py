"""A whole distillation step with a real pair: TRL's DistillationTrainer, and opsd with either sampler.

    python scripts/bench_step.py                 SmolLM2-135M teaches its own 15 layers; about ten minutes on two cores
    python scripts/bench_step.py --quick         fewer tokens and rounds, about three minutes
    python scripts/bench_step.py --methods trl trl-kernel trl-fused opsd-hf opsd-hf-tip
                                                 with selection inside TRL and opsd, see docs/trl.md

Each trainer is its own process; they take turns step by step, so that other load on the machine affects all of
them equally. The same prompts, answers of the same length (no end token), reverse KL, fp32, AdamW. The first step of
each is a warm-up; in it TRL trains on opsd's answers, so that both losses must be equal. vllm-alone trains nothing:
vLLM generates as many tokens for the same prompts, which is the least that a rollout with it takes. trl-kernel and
trl-fused are TRL with selection by our two engines, opsd-…-tip is opsd with it; the others train on all tokens.
Seconds are wall and CPU seconds; GFLOP/s and GB/s are those of one thread. Ratios hold within one run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Literal

# Idle threads must not spin: the running trainer needs the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import tyro

from bench.floor import floor, measure, shape_of
from opsd.model.loading import load_model, load_tokenizer
from opsd.utils.errors import UserError, exits_on_bad_input
from smollm2 import load, thin

Method = Literal["trl", "trl-kernel", "trl-fused", "opsd-hf", "opsd-hf-tip", "opsd-vllm", "opsd-vllm-tip", "vllm-alone"]
PROMPT = "Question {number}: what is {number} times {other}?{more} Explain every step, then give the answer."
ANSWER_S = 1200.0


@dataclass(frozen=True)
class Options:
    """What runs."""

    out: Path = Path("runs/bench_step")
    """Folder for models, the trainers' output, and step.json with all that was measured."""
    student: str = ""
    """Model folder; empty: every second of SmolLM2's 30 layers."""
    teacher: str = ""
    """Model folder with the student's tokenizer; empty: SmolLM2-135M."""
    methods: tuple[Method, ...] = ("trl", "opsd-hf", "opsd-vllm", "vllm-alone")
    """Trainers; ratios need trl, the comparison of losses needs opsd-hf as well."""
    prompts: int = 8
    """Prompts (and answers) per step."""
    new_tokens: int = 64
    """Tokens of each answer."""
    rounds: int = 5
    """Measured steps of each trainer, after the warm-up."""
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    """OpenMP threads of each trainer; they take turns."""
    rate_s: float = 1.0
    """Seconds spent on measuring each of the machine's rates."""
    lr: float = 1e-6
    """Learning rate, constant."""
    selector: str = "soft_or"
    """Rule of the trainers that select; it normalises over rollouts."""
    retention: float = 0.5
    """Fraction of each answer's tokens that these keep."""
    quick: bool = False
    """Three rounds of 16 tokens."""


class Trainer:
    """One trainer's process, and the connection to it."""

    def __init__(self, settings: dict[str, Any], log: Path) -> None:
        self.method, self._log = settings["method"], log
        self._line, theirs = Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.step_worker", str(theirs.fileno())],
                cwd=Path(__file__).parent,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        self._send(settings)
        self._answer()

    def step(self, responses: list[list[int]] | None = None) -> dict[str, Any]:
        """What a step took; responses: trained on in place of the trainer's own rollouts."""
        self._send({"responses": responses})
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        self._line.send_bytes(json.dumps(message).encode())

    def _answer(self) -> dict[str, Any]:
        try:
            if not self._line.poll(ANSWER_S):
                raise UserError(f"{self.method} gave no answer in {ANSWER_S:g} s; its output is in {self._log}")
            message = json.loads(self._line.recv_bytes())
        except (EOFError, OSError):
            raise UserError(f"{self.method} ended by itself; its output is in {self._log}") from None
        if "error" in message:
            raise UserError(f"{self.method} failed ({message['error'].splitlines()[0]}); its output is in {self._log}")
        return message


def main(options: Options) -> None:
    """Run all rounds, write step.json and print the table."""
    if options.quick:
        options = dataclasses.replace(options, rounds=3, new_tokens=16)
    torch.set_num_threads(options.threads)
    if min(options.rounds, options.prompts, options.new_tokens, options.threads) < 1:
        raise UserError("--rounds, --prompts, --new_tokens and --threads: give 1 or more")
    shutil.rmtree(options.out / "work", ignore_errors=True)
    (options.out / "work").mkdir(parents=True)
    settings = prepare(options)
    warm, rounds = take_turns(options, settings)
    report = summary(options, settings, warm, rounds)
    (options.out / "step.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def prepare(options: Options) -> dict[str, Any]:
    """Models without an end token, prompts, and all settings of the trainers."""
    folders = {name: options.out / "models" / name for name in ("student", "teacher")}
    for every, (name, folder) in zip((2, 1), folders.items(), strict=True):
        make_folder(folder, getattr(options, name), every, f"--{name}")
    texts = [
        PROMPT.format(number=n + 2, other=7 * n + 11, more=" Think before you write." * (n % 3))
        for n in range(options.prompts)
    ]
    file = options.out / "work" / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    lengths = [len(ids) for ids in load_tokenizer(str(folders["student"]), "--student")(texts)["input_ids"]]
    return {
        "student": str(folders["student"].resolve()),
        "teacher": str(folders["teacher"].resolve()),
        "prompts": texts,
        "prompts_file": str(file.resolve()),
        "prompt_tokens": max(lengths),
        "all_prompt_tokens": sum(lengths),
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "lr": options.lr,
        "selector": options.selector,
        "retention": options.retention,
    }


def make_folder(folder: Path, given: str, every: int, flag: str) -> None:
    """A copy of the model folder `given` (empty: SmolLM2, each `every`-th layer), whose answers have no end."""
    if given:
        model: Any = load_model(given, flag, torch.float32, torch.device("cpu"))
        tokenizer: Any = load_tokenizer(given, flag)
    else:
        model, tokenizer = load()
        thin(model, every)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token = None
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def take_turns(options: Options, settings: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The warm-up steps and the measured ones, by method; the trainers of a round run one after the other."""
    trainers: dict[str, Trainer] = {}
    try:
        for method in sorted(options.methods):  # opsd first: TRL's warm-up needs its answers
            work = options.out / "work" / method
            told = {**settings, "method": method, "out": str(work.resolve())}
            trainers[method] = Trainer(told, options.out / "work" / f"{method}.log")
        warm: dict[str, Any] = {}
        for method, trainer in trainers.items():
            warm[method] = trainer.step(first_answers(options, settings) if method.startswith("trl") else None)
        rounds = []
        for number in range(options.rounds):
            rounds.append({method: trainer.step() for method, trainer in trainers.items()})
            shown = ", ".join(f"{m} {s['stages']['step']['wall_s']:.2f} s" for m, s in rounds[-1].items())
            print(f"round {number + 1}/{options.rounds}: {shown}", file=sys.stderr, flush=True)
        return warm, rounds
    finally:
        for trainer in trainers.values():
            trainer.close()


def first_answers(options: Options, settings: dict[str, Any]) -> list[list[int]] | None:
    """The answers of opsd-hf's first step, prompt by prompt; None if it does not run."""
    file = options.out / "work" / "opsd-hf" / "rollouts" / "step_1.jsonl"
    if not file.exists():
        return None
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    tokenizer = load_tokenizer(settings["student"], "--student")
    answers = {tuple(row["prompt_ids"]): row["response_ids"] for row in rows}
    return [answers[tuple(ids)] for ids in tokenizer(settings["prompts"])["input_ids"]]


def summary(options: Options, settings: dict[str, Any], warm: dict[str, Any], rounds: list[dict]) -> dict[str, Any]:
    """All that was measured, as JSON values."""
    student, teacher = shape_of(settings["student"]), shape_of(settings["teacher"])
    read_tokens = settings["all_prompt_tokens"] + options.prompts * (options.new_tokens - 1)
    rates = measure(student, read_tokens, options.rate_s)
    lowest = floor(student, teacher, settings["all_prompt_tokens"], options.prompts, options.new_tokens, rates)
    methods = {}
    for method in warm:
        stages = rounds[0][method]["stages"]
        methods[method] = {
            "warm_up": warm[method],
            "steps": [each[method] for each in rounds],
            "median": {
                stage: {
                    unit: statistics.median(each[method]["stages"][stage][unit] for each in rounds)
                    for unit in ("wall_s", "cpu_s")
                }
                for stage in stages
            },
        }
    return {
        "settings": {
            key: value for key, value in settings.items() if key not in ("student", "teacher", "prompts_file")
        },
        "machine": {
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": options.threads,
            **dataclasses.asdict(rates),
        },
        "floor_cpu_s": lowest,
        "methods": methods,
        "ratio_to_trl": {
            method: {
                unit: statistics.median(
                    each[method]["stages"]["step"][unit] / each["trl"]["stages"]["step"][unit] for each in rounds
                )
                for unit in ("wall_s", "cpu_s")
            }
            for method in warm
            if "trl" in warm
        },
    }


def processor() -> str:
    """The processor's name, as Linux gives it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(report: dict[str, Any]) -> str:
    """The report as markdown: medians, wall / processor seconds."""
    machine, lowest = report["machine"], report["floor_cpu_s"]
    lines = [
        f"{machine['processor']} ({machine['capability']}), {machine['threads']} threads; one thread: "
        f"{machine['gflop_s']:.0f} GFLOP/s, {machine['gb_s']:.1f} GB/s",
        "",
        "| | step, wall s | step, CPU s | of TRL, wall | of TRL, CPU | stages, CPU s | first loss, nats | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, found in report["methods"].items():
        step, ratio = found["median"]["step"], report["ratio_to_trl"].get(method)
        shares = [f"{ratio[unit]:.2f}" for unit in ("wall_s", "cpu_s")] if ratio else ["-", "-"]
        stages = ", ".join(f"{n} {s['cpu_s']:.2f}" for n, s in found["median"].items() if n != "step")
        cells = [method, f"{step['wall_s']:.2f}", f"{step['cpu_s']:.2f}", *shares, stages]
        loss = found["warm_up"]["loss_nats"]
        cells += ["-" if loss is None else f"{loss:.5f}", f"{found['steps'][-1]['peak_mib']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in lowest.items())
    lines.append(f"| floor | - | {sum(lowest.values()):.2f} | - | - | {parts} | - | - |")
    return "\n".join(lines)


if __name__ == "__main__":
    with exits_on_bad_input("bench_step"):
        main(tyro.cli(Options, description=__doc__))
