"""Generated tasks, the public queries where they are at hand, and a user's copy of the benchmark where there is one."""

import os
from pathlib import Path

import pytest

from opsd.environments.travel import TravelEnv, generate_tasks, pocket_tasks
from opsd.environments.travel.official import Official
from opsd.environments.travel.task import travel_folder

QUERIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "deepplanning"


@pytest.fixture(scope="session")
def env():
    return TravelEnv()


@pytest.fixture(scope="session")
def full_tasks():
    return generate_tasks(12, seed=3, compact=False)


@pytest.fixture(scope="session")
def compact_tasks():
    return generate_tasks(40, seed=3)


@pytest.fixture(scope="session")
def word_tasks():
    return pocket_tasks(40, seed=3)


@pytest.fixture(scope="session")
def queries():
    """The folder with the 240 public queries: beside the project, or in the benchmark's copy."""
    if QUERIES.is_dir():
        return QUERIES
    if root := os.environ.get("DEEPPLANNING_ROOT"):
        return travel_folder(Path(root)) / "data"
    pytest.skip("needs the DeepPlanning benchmark: set DEEPPLANNING_ROOT to a copy of it")


@pytest.fixture(scope="session")
def official():
    """The benchmark's own code."""
    root = os.environ.get("DEEPPLANNING_ROOT")
    if not root:
        pytest.skip("needs the DeepPlanning benchmark: set DEEPPLANNING_ROOT to a copy of it")
    return Official(Path(root))
