"""The bench on a real pair, from warm-up to a file of results, with tiny models in place of SmolLM2."""

import dataclasses
import json
from pathlib import Path

import pytest

import real_bench
from opsd.config import TrainConfig
from opsd.config.cli import parse
from reporting.leaderboard import gains_in
from reporting.results import Results

SHORT = {
    "prompt_format": "raw",
    "steps": "2",
    "prompts_per_step": "2",
    "rollout.max_new_tokens": "6",
    "optim.warmup_steps": "1",
}


@pytest.fixture
def options(tmp_path):
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) + "\n" for a in range(6)))
    return real_bench.Options(
        tmp_path / "runs",
        sums,
        sums,
        tmp_path / "results.json",
        rules=("q3",),
        cells=("--select.by all --loss.divergence jsd",),
        retentions=(0.5,),
        seeds=(0,),
        lanes=2,
        limit=4,
        warm_up=dict(SHORT),
        protocol=dict(SHORT),
    )


def test_cells_come_by_seed_then_by_retention_and_are_named_as_everywhere(tmp_path):
    options = real_bench.Options(tmp_path, Path("p"), Path("h"), Path("r"), rules=("q3", "random"), seeds=(0, 1))
    groups = list(real_bench.cells(options, Path("student")))
    names = [[cell.name for cell in group] for group in groups]
    flat = [name for group in names for name in group]
    assert len(flat) == 2 * (1 + 4 * 2) and max(map(len, names)) == 2 * options.lanes
    assert flat[:2] == ["smollm2-all-seed0", "smollm2-q3-50-seed0"] and flat[9] == "smollm2-all-seed1"
    assert names[2] == ["smollm2-random-5-seed0"]


def test_every_cell_shares_the_protocol_and_differs_in_its_rule_and_seed(options):
    configs = []
    for group in real_bench.cells(options, Path("student")):
        configs += [parse(TrainConfig, list(cell.command[len(cell.launch) :]), "opsd train") for cell in group]
    assert [config.select.by for config in configs] == ["all", "all", "q3"]
    assert [config.loss.divergence for config in configs] == ["reverse_kl", "jsd", "reverse_kl"]
    assert {(config.optim.lr, config.steps, config.student) for config in configs} == {(1e-4, 2, "student")}


@pytest.mark.e2e
def test_from_models_to_a_file_of_results(options, make_folder, make_model, monkeypatch, capsys):
    for name, seed in (("student", 0), ("teacher", 1)):
        (options.runs / name).parent.mkdir(exist_ok=True)
        (options.runs / name).symlink_to(make_folder(make_model(seed=seed)))
    how = {"prompt_format": "raw", "max_new_tokens": 6, "grader": "suffix"}
    monkeypatch.setattr(real_bench, "MEASURE", real_bench.MEASURE | how)
    real_bench.main(options)
    results = Results.read(options.results)
    assert [run["cell"] for run in results.values["runs"]] == ["all", "all-jsd", "q3-50"]
    assert len(results.values["before"]["own/reverse_kl_nats"]) == 4
    (gain,) = [of for cell, of in gains_in(results, "own/reverse_kl_nats").items() if cell.selector == "q3"]
    assert gain.stderr_problems is not None
    # Weights go once they are measured; the warm-up's stay, and nothing is run twice.
    assert not list(options.runs.glob("smollm2-*/checkpoints")) and (options.runs / "warmup" / "checkpoints").exists()
    first = options.results.read_text()
    monkeypatch.setattr(real_bench, "run", None)
    monkeypatch.setattr(real_bench, "measure_distance", None)
    real_bench.main(options)
    assert options.results.read_text() == first
    # Of a bench that is not finished, what is measured can be collected.
    (options.runs / "distance" / "smollm2-q3-50-seed0.json").unlink()
    real_bench.main(dataclasses.replace(options, only_collect=True))
    assert [run["cell"] for run in Results.read(options.results).values["runs"]] == ["all", "all-jsd"]
