"""What a plan takes the machine for, and what a run says of it before it starts."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from opsd.config import EngineConfig, RolloutConfig, TeacherConfig, TrainConfig
from opsd.config.cli import parse
from opsd.estimate import command, hardware
from opsd.estimate.command import PlanConfig, in_short, planned, verdict
from opsd.estimate.hardware import Hardware, sheet_hardware, this_hardware
from opsd.estimate.opening import opening
from opsd.estimate.rates import fastest, product_rate
from opsd.utils.errors import UserError

PAIR = ("--student", "qwen3-4b", "--teacher", "qwen3-8b")
SLOW = Hardware(1, 16.0, 0.1, 10.0, False, "cpu", "this CPU (2 threads)")


def plan(*flags):
    return planned(parse(PlanConfig, [*PAIR, *flags], "opsd plan"))


@pytest.fixture
def slow(monkeypatch):
    """This machine, with rates that are known."""
    monkeypatch.setattr(command, "this_hardware", lambda device, ranks, flash, shape: SLOW)


def test_this_machine_has_the_memory_that_it_has_and_rates_that_were_measured():
    found = this_hardware("cpu", 1, False, (64, 32))
    import psutil

    assert 0 < found.gib * 2**30 <= psutil.virtual_memory().total
    assert found.kind == "cpu" and found.tflops > 0 and found.bandwidth_gbs > 0
    assert this_hardware("cpu", 2, False, (64, 32)).gib == found.gib / 2  # ranks share it


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak can be forgotten on Linux only")
def test_what_the_rates_are_measured_with_is_no_part_of_a_runs_peak():
    this_hardware("cpu", 1, False, (64, 32))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, now = (1024 * int(status[name].split()[0]) for name in ("VmHWM", "VmRSS"))
    assert peak - now < 64 * 2**20  # reading is measured with 256 MiB


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_named_not_guessed():
    with pytest.raises(UserError, match=r"no CUDA device here; name a GPU, e\.g\. --hardware h200"):
        this_hardware("cuda", 1, False, (64, 32))
    with pytest.raises(UserError, match=r"--hardware h200 and --engine\.device cpu: give one of them"):
        plan("--hardware", "h200", "--engine.device", "cpu")


def test_several_ranks_on_a_machine_without_a_gpu_are_told_how_to_plan_for_gpus(slow):
    several = ("--gpus", "8", "--engine.kind", "deepspeed")
    last = in_short(plan(*several)).splitlines()[-1]
    assert "8 ranks" in last and last.endswith(
        "; there is no GPU here: for 8 GPUs add --hardware h200, h100, a100, a100-40, b200, l40s or rtx4090"
    )
    for named in (("--hardware", "h200"), ("--hardware", "cpu"), ("--engine.device", "cpu")):
        assert "no GPU here" not in in_short(plan(*several, *named))
    assert "no GPU here" not in in_short(plan())


def test_a_rate_is_work_over_the_fastest_calls_time():
    calls, clock = [], iter([0.0, 4.0])
    # One call that does not count, and one, however short the time is.
    assert fastest(lambda: calls.append(1), 0.0, lambda: next(clock)) == 4.0 and len(calls) == 2
    # 2·tokens·rows·columns operations in the 2 seconds that this clock says of each
    ticks = iter(range(0, 10**9, 2))
    assert product_rate([(8, 4)], 3, 0.0, lambda: next(ticks)) == pytest.approx(2e-9 * 3 * 8 * 4 / 2)


def test_a_named_gpu_is_its_data_sheet_and_flags_stand_over_it():
    found = sheet_hardware("h200", 8, True)
    assert (found.gib, found.tflops, found.bandwidth_gbs) == (131.3, 0.4 * 989, 0.6 * 4800)
    values = plan("--hardware", "h100", "--gpu_gib", "40")
    assert values["gpu_gib"] == 40 and values["hardware"] == "an H100"


def test_the_verdict_names_what_was_assumed_and_a_time_in_words(slow):
    found = plan("--prompts_per_step", "1", "--rollout.samples_per_prompt", "1", "--steps", "10")
    line = verdict(found)
    assert line.startswith("does not fit on this CPU (2 threads): peak ") and "of 16.0 GiB" in line
    assert "for 10 steps" in line and "e-0" not in line and "\n" not in line
    assert in_short(found).splitlines()[-1] == line


def test_a_model_with_too_few_positions_is_said(slow, tmp_path, make_folder, make_model):
    folder = str(make_folder(make_model()))  # 256 positions
    flags = ("--student", folder, "--teacher", folder, "--rollout.max_prompt_tokens", "200", "--rollout.max_new_tokens")
    config = [parse(PlanConfig, [*flags, new], "opsd plan") for new in ("56", "57")]
    assert planned(config[0])["positions"] is None
    line = planned(config[1])["positions"]
    assert (
        "has 256 positions" in line and "--rollout.max_new_tokens 57" in line and line in in_short(planned(config[1]))
    )


def test_quantised_weights_that_a_run_refuses_are_refused_in_its_plan(slow, make_folder, make_model):
    folder = make_folder(make_model())
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    for flags in (("--student", str(folder)), ("--teacher", str(folder))):
        with pytest.raises(UserError, match=rf"^{flags[0]} [^\n]* its weights are quantised \(gptq\)"):
            plan(*flags)


def run_of(folder, **changes):
    base = TrainConfig(student=folder, teacher=TeacherConfig(folder), prompts="p", out="runs/mine", steps=100)
    return dataclasses.replace(base, **{"engine": EngineConfig(dtype="float32"), **changes})


def test_a_run_says_what_it_is_and_what_it_will_need(slow, make_folder, make_model):
    lines = opening(run_of(str(make_folder(make_model()))), 1, 10)
    assert len(lines) == 2 and "learns from" in lines[0] and lines[0].startswith("mine: ")
    assert "32 answers per step of at most 512 tokens" in lines[0]
    assert lines[1].startswith("plan: fits on this CPU (2 threads)")


def test_a_run_that_cannot_fit_or_takes_days_is_warned_of_and_not_refused(slow):
    run = dataclasses.replace(run_of("qwen3-4b"), rollout=RolloutConfig(max_new_tokens=8192))
    lines = opening(run, 1, 2048)
    assert [line.partition(":")[0] for line in lines[2:]] == ["warning", "warning"]
    assert "may run out of memory" in lines[2] and "days" in lines[3]


def test_a_model_that_cannot_be_planned_is_said_and_trained_all_the_same(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    lines = opening(run_of(str(tmp_path)), 1, 10)
    assert len(lines) == 2 and lines[1].startswith("no plan: --student ") and "gemma2" in lines[1]


def test_measuring_costs_no_more_than_it_says(monkeypatch):
    asked = []
    monkeypatch.setattr(hardware, "product_rate", lambda shapes, tokens, seconds, **_: asked.append(seconds) or 100.0)
    monkeypatch.setattr(hardware, "read_rate", lambda seconds, **_: asked.append(seconds) or 10.0)
    found = this_hardware("cpu", 1, False, (64, 32))
    assert sum(asked) <= 1.0
    assert (found.tflops, found.bandwidth_gbs) == (pytest.approx(0.055), pytest.approx(6.0))
