"""Two ranks: ZeRO-3 training and vLLM samplers: one over both, one on each, in processes of their own.

Arguments: folder, run. run: "run", or "lora", which trains adapters and samples greedily: then transformers would write
the same.
"""

import functools
import json
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from opsd.config import from_json
from opsd.rollout import vllm as rollout_vllm
from opsd.train import start
from opsd.utils.distributed import join
from opsd.utils.errors import RunStopped

HELPERS = runpy.run_path(str(Path(__file__).with_name("worker.py")))
CPU = torch.device("cpu")


def model(seed: int):
    """Random, of a shape that vLLM's CPU attention takes, and with heads that two ranks can share."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def main(out: Path, run: str) -> None:
    for name, seed in (("student", 0), ("teacher", 1)):
        model(seed).save_pretrained(out / name)
        HELPERS["tokenizer"]().save_pretrained(out / name)
    _ = rollout_vllm._import_vllm(CPU).LLM  # so that no rank has to
    for width in (2, 1, 0):
        HELPERS["on_ranks"](2, functools.partial(train, out, width, run))
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
