"""DeepSpeed: ZeRO 1 to 3 over any number of ranks, on CUDA (NCCL) or CPU (gloo)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from opsd.config import EngineConfig, OptimConfig
from opsd.data.packing import empty
from opsd.distill import DistillResult
from opsd.engine.base import Engine, optimizer_of, settled, swapped
from opsd.model.lora import PlainWeight
from opsd.model.scorer import HeadUse, Result, Scorer
from opsd.types import Head, MicroBatch
from opsd.utils.distributed import Ranks

# The state tensors that each optimiser keeps per weight.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


class DeepSpeedEngine(Engine):
    """Engine on DeepSpeed: torch's AdamW or SGD over shards, fp32 master weights whatever the compute type.

    All ranks must make the same calls, with the same number of micro-batches (see
    `opsd.data.packing.share`): under ZeRO every forward and backward is a collective.
    """

    def __init__(
        self, student: Scorer, engine: EngineConfig, optim: OptimConfig, device: torch.device, ranks: Ranks
    ) -> None:
        super().__init__(student, engine, device, ranks)
        self._stage, self._moments = engine.zero_stage, MOMENTS[optim.kind]
        # Ranks gather weights layer by layer: all must call the model the same number of times.
        student.packed = student.packed or self._stage == 3
        exact = {}
        if self._dtype != torch.float32:
            # DeepSpeed converts the weights to the compute type and then takes its master copy from them.
            exact = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self._named.items()}
        buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
        self._deepspeed = import_deepspeed(device)
        settings = deepspeed_config(settled(engine, device), optim)
        optimizer = optimizer_of(self._named, optim)
        self._engine, *_ = self._deepspeed.initialize(model=student, optimizer=optimizer, config=settings)
        if self._moments:
            self._allocate_moments()
        for name, weight in exact.items():
            self._tensor_api("safe_set_full_fp32_param")(self._named[name], weight.to(device))
        for buffer, value in buffers:
            # Rotary frequencies stay fp32: rounding them would shift far positions.
            buffer.data = value
        student.train()

    def sampling(self) -> contextlib.AbstractContextManager[Any]:
        """See Engine. ZeRO-3 gathers once, so that ranks may then generate answers of different lengths."""
        if self._stage < 3:
            return contextlib.nullcontext()
        from deepspeed.runtime.zero import unwrap_model_for_generation

        return unwrap_model_for_generation(self._engine)

    def forward(self, micro: MicroBatch, use: HeadUse[Result]) -> Result:
        """See Engine. Goes through DeepSpeed's wrapper, so that shards are gathered when a module needs them."""

        def visible(hidden_ND: torch.Tensor, head: Head) -> tuple[list[torch.Tensor], Result]:
            # DeepSpeed attaches its backward hooks to the tensors in a module's output: the loss must be one of them.
            result = use(hidden_ND, head)
            return [result.loss_sum] if isinstance(result, DistillResult) else [], result

        found, result = self._engine(micro.to(self.device), visible)
        return dataclasses.replace(result, loss_sum=found[0]) if found else result

    def backward(self, loss_sum: torch.Tensor, global_count: float) -> None:
        """See Engine. DeepSpeed averages over ranks; multiplying by their number gives the sum."""
        self._engine.backward(loss_sum * (self.ranks.world_size / global_count), scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.nan

    def discard(self) -> None:
        """See Engine.

        ZeRO keeps gradients in buffers of its own, which only a step empties. So take a step that DeepSpeed skips by
        itself: add a gradient that is not finite.
        """

        def spoil(hidden_ND: torch.Tensor, _: Head) -> DistillResult:
            nothing: Any = None
            return DistillResult(math.nan * hidden_ND.sum(), nothing, nothing)

        # Through a hidden state, so that it reaches everything that is trained, even if that is only adapters.
        one_row = dataclasses.replace(empty(), rows_N=torch.zeros(1, dtype=torch.int64))
        self.backward(self.forward(one_row, spoil).loss_sum, 1.0)
        if math.isfinite(self.step(0.0)):
            raise RuntimeError("DeepSpeed took a step with a gradient that is not finite")

    @contextlib.contextmanager
    def lent(self, shares: dict[str, torch.Tensor]) -> Iterator[None]:
        """See Engine. Under ZeRO-3 the shards are replaced, and weights that stay whole are gathered again;
        under ZeRO-1 and 2 a second copy of the weights exists meanwhile, in the compute type."""
        if self._stage < 3:
            whole = {name: self._whole_of(share, self._named[name]) for name, share in shares.items()}
            with swapped(self._named, whole):
                yield
            return
        own = {name: parameter.ds_tensor.clone() for name, parameter in self._named.items()}  # pyrefly: ignore
        self._set_shards(shares)
        try:
            yield
        finally:
            self._set_shards(own)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return self._collect(self._state() if self._moments else ())

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        if not tensors:
            return
        optimizer = self._torch_optimizer()
        step = next(tensor for name, tensor in tensors.items() if name.endswith("/step"))
        for state in optimizer.state.values():
            state["step"].copy_(step)
        for name, parameter in self._named.items():
            for moment in self._moments:
                tensor = tensors[f"{name}/{moment}"].to(self.device)
                self._tensor_api("safe_set_full_optimizer_state")(parameter, tensor, moment)

    def _allocate_moments(self) -> None:
        """Create AdamW's state before its first step, as AdamW would, so that it can be read and loaded at any time.

        DeepSpeed's ZeRO-1 and 2 would link only the first group's parameters to their moments.
        """
        optimizer = self._torch_optimizer()
        shards = [shard for group in optimizer.param_groups for shard in group["params"]]
        if self._stage == 3:
            # The shards are in the groups only during a step.
            shards = self._engine.optimizer.fp32_partitioned_groups_flat
        for shard in shards:
            zeros = {moment: torch.zeros_like(shard) for moment in self._moments}
            optimizer.state[shard] = {"step": torch.zeros((), device=shard.device), **zeros}
        if self._stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def _whole(self, plain: PlainWeight) -> Iterator[torch.Tensor]:
        with self._deepspeed.zero.GatheredParameters([plain.weight], enabled=self._stage == 3):
            a, b = (None if part is None else self._full_weight(part) for part in (plain.a, plain.b))
            yield plain.formed(plain.weight.data, a, b)

    def _full_weight(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return self._tensor_api("safe_get_full_fp32_param")(parameter)

    def _share(self, whole: torch.Tensor) -> torch.Tensor:
        """See Engine. Split as by ZeRO-3: flat, padded with zeros."""
        size = math.ceil(whole.numel() / self.ranks.world_size)
        part = whole.detach().flatten()[self.ranks.rank * size :][:size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))

    def _joined(self, share: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        shape = parameter.ds_shape if self._stage == 3 else parameter.shape  # pyrefly: ignore
        return self.ranks.concatenate(share)[: math.prod(shape)].view(shape)

    def _whole_of(self, share: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Like `_joined`, in the parameter's type."""
        return self._joined(share.to(parameter.dtype), parameter)

    def _set_shards(self, shares: dict[str, torch.Tensor]) -> None:
        """ZeRO-3: set every shard while no weight is whole; then gather again what DeepSpeed keeps whole."""
        offload = self._engine.optimizer.parameter_offload
        offload.partition_all_parameters()
        for name, parameter in self._named.items():
            parameter.ds_tensor.copy_(shares[name])  # pyrefly: ignore
        if offload.persistent_parameters:
            offload.persistent_parameters[0].all_gather(offload.persistent_parameters)

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimiser's state, one by one, as named whole tensors."""
        step = next(iter(self._torch_optimizer().state.values()))["step"]
        for name, parameter in self._named.items():
            for moment in self._moments:
                yield f"{name}/{moment}", self._tensor_api("safe_get_full_optimizer_state")(parameter, moment)
            yield f"{name}/step", step

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser inside DeepSpeed's wrappers."""
        return self._engine.optimizer.optimizer

    def _tensor_api(self, name: str) -> Callable[..., Any]:
        return getattr(self._deepspeed.utils, name)


def deepspeed_config(engine: EngineConfig, optim: OptimConfig) -> dict[str, Any]:
    """DeepSpeed's settings. Gradients add up until `step`, however many micro-batches there were."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # Counts that DeepSpeed requires; nothing of ours is divided by them.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        # SGD is not on its list of optimisers known to work; tests/scale compares it with plain torch.
        "zero_allow_untested_optimizer": optim.kind == "sgd",
        "bf16": {"enabled": engine.dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": optim.max_grad_norm,
        "steps_per_print": None,
    }


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed with the right accelerator and without its notices."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device.type == "cpu":
        # Otherwise DeepSpeed compiles a faster all-reduce at the first start: that needs a compiler, and a build that
        # was killed leaves a lock for which later starts wait forever. gloo is good enough here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that newer versions of torch warn about.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
