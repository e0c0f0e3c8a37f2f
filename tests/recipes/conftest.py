"""A copy of the recipes in an empty project, with stand-ins for the programs that they start."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands in for `opsd` and `deepspeed`: notes its arguments, and leaves a run folder as a finished run would.
TRAINER = """#!/bin/bash
echo "$(basename "$0") $*" >>calls
while (($#)); do
    [[ $1 == --out || $1 == --resume ]] && run=$2
    shift
done
mkdir -p "$run"
echo '{}' >"$run/config.json"
[[ -e fail ]] && exit 3
touch "$run/DONE"
"""
# Stands in for `python`: what runs the cells is the real one.
PYTHON = f"""#!/bin/bash
[[ $1 != scripts/run_cells.py ]] || exec {sys.executable} "$@"
echo "$(basename "$0") $*" >>calls
"""


@dataclass(frozen=True)
class Project:
    """root: the copy. bin: the folder of stand-ins, first on PATH."""

    root: Path
    bin: Path

    def program(self, name: str, text: str) -> None:
        """Put a stand-in on PATH."""
        file = self.bin / name
        file.write_text(text)
        file.chmod(0o755)

    def run(self, *flags: str, recipe: str = "table5_soft_or.sh", **env: str) -> subprocess.CompletedProcess[str]:
        """Run a recipe; no variable of the caller's is passed on."""
        path = f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin"
        command = ["bash", str(self.root / "recipes" / recipe), *flags]
        return subprocess.run(command, env={"PATH": path, **env}, capture_output=True, text=True, cwd="/")

    def calls(self) -> list[str]:
        """The programs that were started, with their arguments."""
        file = self.root / "calls"
        return file.read_text().splitlines() if file.exists() else []


def make_project(folder: Path) -> Project:
    """A project with `opsd` installed and no GPU."""
    root = folder / "project"
    for name in ("recipes", "scripts/lanes", "scripts/run_cells.py", "scripts/reporting/cells.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        copy(ROOT / name, root / name)
    made = Project(root, folder / "bin")
    made.bin.mkdir()
    made.program("opsd", TRAINER)
    made.program("python", PYTHON)
    made.program("python3", f'#!/bin/bash\nexec {sys.executable} "$@"\n')  # names the cells
    made.program("nvidia-smi", "#!/bin/bash\nexit 9\n")
    return made


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """See make_project."""
    return make_project(tmp_path)


@pytest.fixture(scope="session")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[str]]:
    """The lines of a recipe's dry run at a scale, for one seed, run once; at paper scale for one pair where it is no
    table's: the other pairs differ as a table's do.
    """
    project = make_project(tmp_path_factory.mktemp("printed"))

    @functools.cache
    def lines(recipe: str, scale: str) -> list[str]:
        narrow = {} if recipe.startswith("table") or scale == "pocket" else {"PAIRS": "qwen3"}
        done = project.run(recipe=recipe, SCALE=scale, DRY_RUN="1", SEEDS="0", **narrow)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return lines
