"""Selection inside TRL on two ranks, once for all tests of them: DDP, ZeRO 2 and 3, FSDP2; weights go to safetensors.

The ranks are forks of this process, anew for each way, with everything imported already. One process comes first.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import trl_pair
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_ranks import on_ranks

from tip_patch.adapters.trl import tip

BATCH = {"normalise_over": "batch"}
# What trains: TRL alone, all tokens selected, half of them by either engine, a rule that chooses within the loss.
RUNS: dict[str, dict[str, Any] | None] = {
    "trl": None,
    "all": {"selector_options": {**BATCH, "retention": 1.0}},
    "kernel": {"selector_options": BATCH},
    "fused": {"selector_options": BATCH, "engine": "fused"},
    "drawn": {"selector": "entropy_sample", "engine": "fused"},
}
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}


def zero(stage: int) -> dict[str, Any]:
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": ADAMW},
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
        }
    }


WAYS = {"ddp": {}, "zero2": zero(2), "zero3": zero(3), "fsdp2": {}}


def models(sharded: bool) -> Any:
    """The pair; cut by FSDP2 as accelerate does it, layer by layer, with the head in the rest."""
    found = trl_pair.tiny_model(False, 0), trl_pair.tiny_model(False, 1)
    for model in found if sharded else ():
        for part in (*model.model.layers, model):
            fully_shard(part)
    return found


def whole(trainer: Any) -> torch.Tensor:
    """All weights, as one vector, on every rank."""
    parts = []
    for parameter in trainer.model.parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                parts.append(parameter.detach().clone().flatten())
        else:
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            parts.append(value.detach().clone().flatten())
    return torch.cat(parts)


def train(folder: Path, settings: dict[str, Any], sharded: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights that each run ends on, and what it logged."""
    # ZeRO-3 would fill models that are made after it began.
    pairs = {name: models(sharded) for name in RUNS}
    if sharded:
        # Accelerate shards on GPUs alone; here it would wrap what is sharded already.
        Accelerator.prepare_model = lambda self, model, **_: model
    ends, lines = {}, {}
    for name, how in RUNS.items():
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        trainer = trl_pair.DistillationTrainer if how is None else tip(trl_pair.DistillationTrainer)
        made = trl_pair.make(trl_pair.fixed(trainer), folder, pairs[name], settings=settings, **(how or {}))
        made.train()
        ends[name], lines[name] = whole(made), trl_pair.logs(made)
    return ends, lines


def keep(out: Path, way: str, found: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    save_file(found[0], out / f"{way}.safetensors")
    (out / f"{way}.json").write_text(json.dumps(found[1]))


def on_rank(out: Path, way: str) -> None:
    if way == "fsdp2":
        torch.distributed.init_process_group("gloo")
    found = train(out / "runs", WAYS[way], way == "fsdp2")
    if torch.distributed.get_rank() == 0:
        keep(out, way, found)


def main(out: Path) -> None:
    for way in WAYS:
        on_ranks(2, lambda way=way: on_rank(out, way))
    # Last: a process that has computed must not be forked.
    keep(out, "one", train(out / "runs", {"gradient_accumulation_steps": 4}, False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
