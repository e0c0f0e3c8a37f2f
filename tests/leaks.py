"""A test leaves the process as it found it: what the next one would notice is compared, and a leak fails by name."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.utils import logging as of_transformers

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
# These decide how a run goes. (Libraries set variables of their own as they are imported, by whichever test.)
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
VARIABLES += ("HOME", "PATH", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE", "DEEPPLANNING_ROOT")
LINEAR = torch.nn.functional.linear


def now() -> dict[str, Any]:
    """What a test could change for those after it, by name."""
    return {
        **{f"environment variable {name}": os.environ.get(name) for name in VARIABLES},
        **{f"the handler of {number.name}": signal.getsignal(number) for number in SIGNALS},
        "the working directory": os.getcwd(),
        "sys.argv": list(sys.argv),
        "torch's default type": torch.get_default_dtype(),
        "torch's threads": torch.get_num_threads(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "whether torch records gradients": torch.is_grad_enabled(),
        "the precision of fp32 products": torch.backends.mkldnn.matmul.fp32_precision,
        "a process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "the level of the root logger": logging.getLogger().level,
    }


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    before, verbosity = now(), of_transformers.get_verbosity()
    yield
    # DeepSpeed's ZeRO-3 replaces it and leaves it so; the command line quiets transformers for its whole process.
    torch.nn.functional.linear = LINEAR
    of_transformers.set_verbosity(verbosity)
    if request.node.get_closest_marker("e2e"):
        return  # whole runs meet process groups and engines, which set what launchers set
    after = now()
    changes = [f"{name}: {old!r} became {after[name]!r}" for name, old in before.items() if after[name] != old]
    assert not changes, "left behind by this test: " + "; ".join(changes)
