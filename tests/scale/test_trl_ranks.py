"""Selection inside TRL on two ranks is selection in one process, and with all tokens kept TRL's own run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerance import close, rounding, transformer
from two_ranks import run_ranks

pytestmark = pytest.mark.e2e
WAYS = ("ddp", "zero2", "zero3", "fsdp2")
RUNS = ("trl", "all", "kernel", "fused", "drawn")
# Two steps of the two-layer model.
TRAINED = transformer(2, 16, backward=2)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("trl")
    done = run_ranks(Path(__file__).with_name("trl_worker.py"), folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def lines(out: Path, way: str, run: str) -> list[dict]:
    return json.loads((out / f"{way}.json").read_text())[run]


@pytest.mark.parametrize("way", WAYS)
def test_all_tokens_kept_end_on_trls_bits(out, way):
    ends = load_file(out / f"{way}.safetensors")
    assert torch.equal(ends["all"], ends["trl"])
    assert not torch.equal(ends["kernel"], ends["trl"])
    for ours, theirs in zip(lines(out, way, "all"), lines(out, way, "trl"), strict=True):
        assert {key: ours[key] for key in ("loss", "grad_norm", "entropy")} == {
            key: theirs[key] for key in ("loss", "grad_norm", "entropy")
        }


@pytest.mark.numeric
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_train_what_one_process_trains(out, way, run):
    # Both divide by the count that all ranks and micro-batches keep; a mean of means would be off by tenths.
    ours, one = (load_file(out / f"{where}.safetensors")[run] for where in (way, "one"))
    assert float((ours - one).norm()) <= rounding(*TRAINED) * float(one.norm())
    for mine, single in zip(lines(out, way, run), lines(out, "one", run), strict=True):
        close(mine["loss"], single["loss"], *TRAINED)
        close(mine["grad_norm"], single["grad_norm"], *TRAINED)
        assert mine.get("select/kept_frac") == single.get("select/kept_frac")


@pytest.mark.numeric
@pytest.mark.parametrize("way", WAYS)
def test_quadrants_are_split_over_all_ranks(out, way):
    for mine, single in zip(lines(out, way, "kernel"), lines(out, "one", "kernel"), strict=True):
        keys = [key for key in single if key.startswith(("quadrant/", "select/"))]
        assert len(keys) > 20
        for key in keys:
            close(mine[key], single[key], *TRAINED, size=0.1, cancels=True, said=key)
