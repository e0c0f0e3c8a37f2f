"""The numeric tests once more under the instruction sets of other processors, each in a process of its own.

What a sum rounds to depends on how many lanes a vector has and in which order they are added: torch, oneDNN and MKL
each choose by the processor. So a tolerance that holds on this machine may be too tight on the next one. Here the
libraries are told to use less than they could.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# Whole runs on several ranks and on the real model add no arithmetic of their own, and take minutes.
OWN = ("data", "distill", "engine", "model", "run", "teacher", "tip_patch", "trainer")
FOLDERS = (*(f"tests/{name}" for name in OWN), "--ignore=tests/distill/test_loss_real_model.py")
CHOSEN = "numeric and not slow"
AT_LEAST = 150
# What ATEN_CPU_CAPABILITY is called, what torch then reports, and the same for oneDNN and MKL.
EMULATED = [
    ("default", "DEFAULT", {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    ("avx2", "AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
]
# Prints what torch runs under, then is pytest.
CHILD = """
import sys
import pytest
import torch
print("capability", torch.backends.cpu.get_cpu_capability(), flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.e2e
@pytest.mark.parametrize(("capability", "reported", "others"), EMULATED, ids=[name for name, *_ in EMULATED])
def test_numeric_tests_hold_under_another_instruction_set(capability, reported, others, tmp_path):
    # This test is not marked numeric and lies outside FOLDERS, so a child never runs it.
    native = torch.backends.cpu.get_cpu_capability()
    if native not in ("AVX2", "AVX512") and native != reported:
        pytest.skip(f"torch runs under {native} here, and cannot be told to use {reported}")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *FOLDERS, "-m", CHOSEN, f"--junitxml={report}"],
        cwd=ROOT,
        env={**inherited, **threads, "ATEN_CPU_CAPABILITY": capability, **others},
        capture_output=True,
        text=True,
    )
    assert f"capability {reported}\n" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-8000:]
    (suite,) = ElementTree.parse(report).getroot()
    assert int(suite.attrib["tests"]) - int(suite.attrib["skipped"]) > AT_LEAST
