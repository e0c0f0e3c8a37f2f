"""Seeds derived from seeds, so that a checkpoint needs no random state."""

import contextlib
import hashlib
from collections.abc import Iterator
from random import Random

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and their order; equal parts give equal seeds everywhere."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def below(rng: Random, limit: int) -> int:
    """A uniform integer in 0 … limit−1, from `random()`, whose values Python keeps the same across versions."""
    return int(rng.random() * limit)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the body with torch's generators at `seed`, then restore their state."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
