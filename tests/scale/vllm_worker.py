"""Run by torchrun: ZeRO-3 training and vLLM samplers. Arguments: folder, ranks to a sampler (0: own processes), run.

run: "run", or "lora", which trains adapters and samples greedily: then transformers would write the same.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from opsd.config import from_json
from opsd.errors import RunStopped
from opsd.ranks import join, leave
from opsd.rollout import vllm as rollout_vllm
from opsd.signals import end
from opsd.train import start

HELPERS = runpy.run_path(str(Path(__file__).with_name("worker.py")))


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


def main(out: Path, width: int, run: str) -> None:
    ranks = join(torch.device("cpu"))
    if ranks.is_main:
        for name, seed in (("student", 0), ("teacher", 1)):
            model(seed).save_pretrained(out / name)
            HELPERS["tokenizer"]().save_pretrained(out / name)
    ranks.gather(None)
    values = json.loads((out / "settings.json").read_text())
    if width:
        values["rollout"]["tensor_parallel"] = width
    else:
        values["rollout"] |= {"engine": "vllm_process", "samplers": 2}
    if run == "lora":
        values |= {"lora": {"rank": 4}, "rollout": {**values["rollout"], "temperature": 0.0}}
    if width == 1:
        rollout_vllm.VLLMRollout._load_weights = miss_the_third(rollout_vllm.VLLMRollout._load_weights)
    said = None
    try:
        start(from_json({**values, "out": str(out / f"{run}{width}")}))
    except RunStopped as stop:
        said = str(stop)
    said = ranks.gather(said)
    if ranks.is_main:
        (out / f"said {run}{width}.json").write_text(json.dumps(said))
    leave()
    end(0)


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
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
