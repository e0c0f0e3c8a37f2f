"""`make setup` on machines that lack something: one line, exit 2, nothing installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ["bash", "dirname", "head", "tr", "grep", "tail", "mktemp", "cat", "cp", "rm", "mkdir"]


@pytest.fixture
def setup(tmp_path):
    """Runs setup.sh in a bare project; PATH holds a few tools and the given stand-ins for Python."""
    root = tmp_path / "project"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", root / "scripts")
    shutil.copy(ROOT / "setup.py", root)
    shutil.copytree(ROOT / "constraints", root / "constraints")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for tool in TOOLS:
        (bin_folder / tool).symlink_to(str(shutil.which(tool)))

    def run(pythons: dict[str, str], **env: str) -> subprocess.CompletedProcess[str]:
        for name, text in pythons.items():
            (bin_folder / name).write_text("#!/bin/bash\n" + text)
            (bin_folder / name).chmod(0o755)
        bash = str(shutil.which("bash"))
        done = subprocess.run(
            [bash, str(root / "scripts" / "setup.sh")],
            env={"PATH": str(bin_folder), **env},
            capture_output=True,
            text=True,
        )
        assert not (root / ".venv").exists()
        return done

    return run


def python(version: str, modules: bool = True) -> str:
    """A stand-in that answers the script's questions as a Python of `version` would."""
    return f'case "$*" in *version_info*) echo {version} ;; *ensurepip*) exit {int(not modules)} ;; *) echo x ;; esac\n'


def test_no_python_at_all(setup):
    done = setup({})
    assert (done.returncode, done.stderr) == (
        2,
        "setup: no Python 3.11 to 3.14 found (python3 is missing); install one, or set PYTHON to its path\n",
    )


def test_a_python_that_is_too_old(setup):
    done = setup({"python3": python("3 9")})
    assert done.returncode == 2
    assert done.stderr.startswith("setup: no Python 3.11 to 3.14 found (python3 is 3 9)")
    assert done.stderr.count("\n") == 1


def test_the_python_that_was_asked_for_is_too_old(setup):
    done = setup({"python3": python("3 12"), "python3.8": python("3 8")}, PYTHON="python3.8")
    assert (done.returncode, done.stderr) == (2, "setup: PYTHON=python3.8 is Python 3.8; give 3.11 or newer\n")


def test_the_python_that_was_asked_for_does_not_run(setup):
    done = setup({"python3": python("3 12")}, PYTHON="python9")
    assert done.returncode == 2
    assert done.stderr.startswith("setup: PYTHON=python9 does not run") and done.stderr.count("\n") == 1


def test_a_python_without_the_venv_module(setup):
    done = setup({"python3.12": python("3 12", modules=False)})
    assert done.returncode == 2
    assert done.stderr.startswith("setup: python3.12 has no venv module") and done.stderr.count("\n") == 1


def test_the_newest_python_is_taken(setup):
    # 3.13 lacks the venv module and 3.11 does not: the message shows which one was chosen.
    done = setup({"python3.11": python("3 11"), "python3.13": python("3 13", modules=False)})
    assert "python3.13 has no venv module" in done.stderr


def test_an_unknown_accelerator(setup):
    done = setup({"python3": python("3 12")}, ACCELERATOR="tpu")
    assert (done.returncode, done.stderr) == (2, "setup: ACCELERATOR=tpu is unknown; give cpu or gpu\n")
