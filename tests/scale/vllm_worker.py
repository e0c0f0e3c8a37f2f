"""Two ranks: ZeRO-3 training and vLLM samplers: one over both, one on each, in processes of their own.

Arguments: folder, run. run: "run", or "lora", which trains adapters and samples greedily: then transformers would write
the same.
"""

import functools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from two_ranks import on_ranks

from opsd.config import from_json
from opsd.rollout import vllm as rollout_vllm
from opsd.train import start
from opsd.utils.distributed import join
from opsd.utils.errors import RunStopped

CPU = torch.device("cpu")


def main(out: Path, run: str) -> None:
    _ = rollout_vllm._import_vllm(CPU).LLM  # so that no rank has to
    for width in (2, 1, 0):
        on_ranks(2, functools.partial(train, out, width, run))
        shared = sorted(path.name for path in Path("/dev/shm").glob("*cpushm*"))
        (out / f"shared {run}{width}.json").write_text(json.dumps(shared))


def train(out: Path, width: int, run: str) -> None:
    """A run whose samplers have so many ranks each (0: processes of their own); what stopped it is noted."""
    ranks = join(CPU)
    values = json.loads((out / "settings.json").read_text())
    if width:
        values["rollout"]["tensor_parallel"] = width
    else:
        values["rollout"] |= {"engine": "vllm_process", "samplers": 2}
    if run == "lora":
        values |= {"lora": {"rank": 4}, "rollout": {**values["rollout"], "temperature": 0.0}}
    said = None
    if width == 1:
        rollout_vllm.VLLMRollout._load_weights = miss_the_third(rollout_vllm.VLLMRollout._load_weights)
    try:
        start(from_json({**values, "out": str(out / f"{run}{width}")}))
    except RunStopped as stop:
        said = str(stop)
    said = ranks.gather(said)
    if ranks.is_main:
        (out / f"said {run}{width}.json").write_text(json.dumps(said))


def miss_the_third(load):
    """On the last rank the third sync leaves the sampler's weights as they are; it still gathers with the others."""
    calls = []

    def maybe(self):
        calls.append(None)
        if len(calls) == 3 and self._ranks.rank == self._ranks.world_size - 1:
            list(self._engine.gathered())
        else:
            load(self)

    return maybe


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
