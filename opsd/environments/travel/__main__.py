"""Writes travel tasks as the files that `opsd train` reads: train.jsonl, held_out.jsonl, and split.json, its record.

python -m opsd.environments.travel --deepplanning_root FOLDER --out data/travel
python -m opsd.environments.travel --synthetic full --train 512 --held_out 64 --out data/synthetic-travel
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import tyro

from opsd.environments.travel.pocket import pocket_tasks
from opsd.environments.travel.synthetic import generate_tasks
from opsd.environments.travel.task import (
    DEEPPLANNING,
    SYNTHETIC,
    TravelTask,
    load_tasks,
    split_tasks,
    travel_folder,
    write_task_file,
)
from opsd.utils.errors import UserError, exits_on_bad_input
from opsd.utils.seeding import derive_seed


def benchmark_split(
    root: Path, langs: tuple[str, ...], train_fraction: float, seed: int
) -> tuple[list[TravelTask], list[TravelTask], dict[str, Any]]:
    """The benchmark's tasks in all `langs`, split by id into training and held-out, and what split.json records."""
    if not 0.0 < train_fraction < 1.0:
        raise UserError(f"--train_fraction {train_fraction}: give a fraction in (0, 1)")
    tasks = [task for lang in langs for task in load_tasks(root, lang)]
    for lang in langs:
        if all(task.db_dir is None for task in tasks if task.lang == lang):
            raise UserError(f"{travel_folder(root)} has no database/database_{lang}; unzip database_{lang}.zip there")
    queries = travel_folder(root) / "data"
    files = {f"travelplanning_query_{lang}.json": queries / f"travelplanning_query_{lang}.json" for lang in langs}
    sums = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}
    train, held_out = split_tasks(tasks, train_fraction, seed)
    return train, held_out, {"source": DEEPPLANNING, "sha256": sums, "train_fraction": train_fraction}


def generated(
    kind: str, train: int, held_out: int, seed: int
) -> tuple[list[TravelTask], list[TravelTask], dict[str, Any]]:
    """Our own tasks, for training and held-out, and what split.json records."""
    if kind == "words":
        both = pocket_tasks(train, seed, "train"), pocket_tasks(held_out, seed, "held_out")
    else:
        # Separate random streams: the held-out tasks do not depend on the number of training tasks.
        trains = generate_tasks(train, derive_seed(seed, "train"), kind == "compact")
        both = trains, generate_tasks(held_out, derive_seed(seed, "held_out"), kind == "compact")
    return *both, {"source": SYNTHETIC, "form": kind}


def main(
    out: Path,
    deepplanning_root: Path | None = None,
    synthetic: Literal["full", "compact", "words"] | None = None,
    langs: tuple[str, ...] = ("en", "zh"),
    train_fraction: float = 0.8,
    train: int = 256,
    held_out: int = 64,
    seed: int = 0,
) -> None:
    """Write train.jsonl, held_out.jsonl and split.json.

    Args:
        out: Folder to write to.
        deepplanning_root: Your copy of the DeepPlanning travel benchmark, databases unzipped.
        synthetic: Generate tasks instead: full, compact (small tables), or words (one token per word).
        langs: Languages of the benchmark to use.
        train_fraction: Fraction of the benchmark's trips that train; the paper says 80 %.
        train: Generated training tasks.
        held_out: Generated held-out tasks.
        seed: Determines the split, and the generated tasks.
    """
    if (deepplanning_root is None) == (synthetic is None):
        raise UserError("give either --deepplanning_root FOLDER or --synthetic full|compact|words")
    if deepplanning_root is not None:
        trains, held, record = benchmark_split(deepplanning_root, langs, train_fraction, seed)
    else:
        assert synthetic is not None
        if min(train, held_out) < 1:
            raise UserError(f"--train {train} --held_out {held_out}: give numbers above 0")
        trains, held, record = generated(synthetic, train, held_out, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_task_file(trains, out / "train.jsonl")
    write_task_file(held, out / "held_out.jsonl")
    ids = {"train": [f"{task.lang}/{task.id}" for task in trains], "held_out": [f"{t.lang}/{t.id}" for t in held]}
    (out / "split.json").write_text(json.dumps({**record, "seed": seed, **ids}, indent=1) + "\n")
    print(f"{len(trains)} training and {len(held)} held-out tasks of {record['source']} are in {out}")


if __name__ == "__main__":
    with exits_on_bad_input("travel"):
        tyro.cli(main, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
