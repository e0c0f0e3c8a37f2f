"""docs/models.md: its table is what the cells say, none is wrong, and what a cell says is what a run says."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from families import FAMILIES
from model_table import CELLS, PAGE, ROOT, WAYS, page


def without_version(text: str) -> str:
    return re.sub(r"transformers [\d.]+ ", "transformers ", text)


def test_the_page_shows_the_cells_and_no_cell_is_wrong():
    cells = json.loads(CELLS.read_text())
    text = PAGE.read_text()
    assert without_version(page(text, cells)) == without_version(text)
    assert set(cells) == set(FAMILIES) and "WRONG" not in text
    tried = [way for of_family in cells.values() for way in of_family]
    assert set(tried) <= set(WAYS) and tried.count("teacher, sharded") == len(FAMILIES)


@pytest.mark.e2e
def test_a_sharded_teacher_with_an_unknown_head_is_refused_and_others_give_their_own_kl():
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: run `make setup`")
    program = (
        "import sys; sys.path.insert(0, 'scripts'); from model_table import cell\n"
        "for family in ('MiniCPM 3', 'Granite'): print('cell:', cell(family, 'teacher, sharded'))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("cell:")]
    assert len(found) == 2, done.stderr
    assert found[0].startswith("cell: --teacher teacher: its logits are not hidden·head")
    assert found[1] == "cell: right"


@pytest.mark.e2e
@pytest.mark.vllm
def test_a_sampler_that_does_not_take_fused_experts_anew_is_found_before_the_first_step():
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    program = (
        "import sys; sys.path.insert(0, 'scripts'); from model_table import cell\n"
        "print('cell:', cell('Qwen3-MoE', 'student, vLLM'))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    (found,) = [line.removeprefix("cell: ") for line in done.stdout.splitlines() if line.startswith("cell:")]
    # vLLM's layers for CPUs do not; those for GPUs may.
    assert found == "right" or found.startswith("--rollout.engine vllm: it cannot reload the weights of student (")
